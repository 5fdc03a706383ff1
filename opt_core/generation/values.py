# SPDX-License-Identifier: Apache-2.0
"""What each field of `GenerationConfig` may hold, and the hashable form that it is kept in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from opt_core.errors import ConfigError
from opt_core.validation import (
    Check,
    flag,
    non_negative,
    number,
    one_of,
    optional,
    positive,
    probability,
    token_id,
    token_ids,
    whole,
)


def _listed(check: Check) -> Check:
    """A list, not empty, whose members pass the check."""

    def checked(name: str, value: object) -> None:
        if not isinstance(value, list | tuple) or not value:
            raise ConfigError(f"{name}: expected a list that is not empty, found {value!r}.")
        for index, member in enumerate(value):
            check(f"{name}[{index}]", member)

    return checked


def _pair(first: Check, second: Check) -> Check:
    def checked(name: str, value: object) -> None:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ConfigError(f"{name}: expected a pair, found {value!r}.")
        first(f"{name}[0]", value[0])
        second(f"{name}[1]", value[1])

    return checked


def _early_stopping(name: str, value: object) -> None:
    if not isinstance(value, bool) and value != "never":
        raise ConfigError(f"{name}: expected True, False or 'never', found {value!r}.")


def _stop_strings(name: str, value: object) -> None:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not strings:
        raise ConfigError(f"{name}: expected a string or a list of them, found {value!r}.")
    if not all(isinstance(text, str) and text for text in strings):
        raise ConfigError(f"{name}: expected strings that are not empty, found {value!r}.")


def _dola_layers(name: str, value: object) -> None:
    if isinstance(value, str):
        return one_of(("low", "high"), "choice of layers")(name, value)
    return _listed(whole(0))(name, value)


def _words(name: str, value: object) -> None:
    """Words that must appear, each a list of ids, or a list of alternatives."""
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{name}: expected a list of words, found {value!r}.")
    for index, word in enumerate(value):
        nested = isinstance(word, list | tuple) and word and not isinstance(word[0], int)
        check = _listed(_listed(_id)) if nested else _listed(_id)
        check(f"{name}[{index}]", word)


def _float32(check: Check) -> Check:
    """The check, for a number that scores of float32 are computed with."""

    def checked(name: str, value: object) -> None:
        check(name, value)
        if isinstance(value, int | float) and abs(value) > _LARGEST:
            raise ConfigError(f"{name}: expected a number of float32, found {value!r}.")

    return checked


def _sequence_bias(name: str, value: object) -> None:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    _listed(_pair(_listed(_id), _float32(number)))(name, pairs)


def plain(value: Any) -> Any:
    """The value with Python's numbers and lists for numpy's, however deep."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return type(value)(plain(member) for member in value)
    return value


def tuples(value: Any) -> Any:
    """The value with tuples for lists, however deep."""
    return tuple(tuples(member) for member in value) if isinstance(value, list | tuple) else value


def _bias_pairs(value: Any) -> Any:
    return tuples(list(value.items()) if isinstance(value, Mapping) else value)


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuples(value)


_id = whole(0)
_ids = _listed(_id)
_factor = optional(probability)
_LARGEST = float(np.finfo(np.float32).max)

CHECKS: Mapping[str, Check] = {
    "max_length": whole(1),
    "max_new_tokens": optional(whole(1)),
    "min_length": whole(0),
    "min_new_tokens": optional(whole(0)),
    "early_stopping": _early_stopping,
    "max_time": optional(positive),
    "stop_strings": optional(_stop_strings),
    "do_sample": flag,
    "num_beams": whole(1),
    "num_beam_groups": whole(1),
    "penalty_alpha": optional(probability),
    "low_memory": optional(flag),
    "num_assistant_tokens": whole(1),
    "num_assistant_tokens_schedule": one_of(("heuristic", "constant"), "schedule"),
    "prompt_lookup_num_tokens": optional(whole(1)),
    "max_matching_ngram_size": optional(whole(1)),
    "dola_layers": optional(_dola_layers),
    "force_words_ids": optional(_words),
    "temperature": _float32(non_negative),
    "top_k": optional(whole(0)),
    "top_p": _factor,
    "min_p": _factor,
    "typical_p": _factor,
    "epsilon_cutoff": probability,
    "eta_cutoff": probability,
    "diversity_penalty": _float32(non_negative),
    "repetition_penalty": _float32(positive),
    "encoder_repetition_penalty": _float32(positive),
    "length_penalty": number,
    "no_repeat_ngram_size": whole(0),
    "bad_words_ids": optional(_listed(_ids)),
    "sequence_bias": optional(_sequence_bias),
    "renormalize_logits": flag,
    "forced_bos_token_id": token_id,
    "forced_eos_token_id": token_ids,
    "remove_invalid_values": flag,
    "exponential_decay_length_penalty": optional(_pair(whole(0), positive)),
    "suppress_tokens": optional(_ids),
    "begin_suppress_tokens": optional(_ids),
    "forced_decoder_ids": optional(_listed(_pair(_id, _id))),
    "guidance_scale": optional(_float32(number)),
    "cache_implementation": optional(one_of(("static",), "kind of cache")),
    "num_return_sequences": whole(1),
    "output_attentions": flag,
    "output_hidden_states": flag,
    "output_scores": flag,
    "output_logits": flag,
    "return_dict_in_generate": flag,
    "pad_token_id": token_id,
    "bos_token_id": token_id,
    "eos_token_id": token_ids,
}

#: Fields that hold lists -> the form in which they can be hashed.
NORMAL_FORMS: Mapping[str, Callable[[Any], Any]] = {
    "stop_strings": _one_or_more,
    "dola_layers": tuples,
    "force_words_ids": tuples,
    "bad_words_ids": tuples,
    "sequence_bias": _bias_pairs,
    "forced_eos_token_id": tuples,
    "exponential_decay_length_penalty": tuples,
    "suppress_tokens": tuples,
    "begin_suppress_tokens": tuples,
    "forced_decoder_ids": tuples,
    "eos_token_id": tuples,
}
