# SPDX-License-Identifier: Apache-2.0
"""`GenerationConfig`: what a caller may ask of `generate`, with the reference's defaults."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Self

from opt_core.config import OPTConfig, read_json_object
from opt_core.errors import InputError
from opt_core.files import atomic_write
from opt_core.generation import values as v
from opt_core.generation.options import (
    ASSISTANT,
    BEAMS,
    CONTRASTIVE,
    LOOKUP,
    RECORDS,
    SAMPLING,
    Option,
    option,
)
from opt_core.validation import (
    did_you_mean,
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

GENERATION_CONFIG_NAME = "generation_config.json"
#: Caches of later versions.
OTHER_CACHES = (
    "dynamic",
    "dynamic_full",
    "hybrid",
    "hybrid_chunked",
    "offloaded",
    "offloaded_hybrid",
    "offloaded_hybrid_chunked",
    "offloaded_static",
    "paged",
    "quantized",
    "sliding_window",
)


_share = optional(probability)
_factor = v.float32(positive)
_scale = v.float32(non_negative)
_LISTED: dict[str, Any] = {"form": v.tuples, "ids": v.tokens}


@dataclasses.dataclass(unsafe_hash=True)
class GenerationConfig:
    """Options of text generation.

    Names and defaults are those of transformers 4.37.2 (`generation/configuration_utils.py`), and a
    few that later versions added: `min_p`, `stop_strings`, `output_logits`, `dola_layers`,
    `cache_implementation`. Options can be set one by one; each is checked when it is. Lists become
    tuples; keys of other libraries are kept in `extra`.

    Raises:
        ConfigError: a value of the wrong kind or out of its range.
    """

    # Lengths, and what else ends a sequence. `max_new_tokens` beats `max_length`, which counts prompt
    # and new tokens together; `early_stopping` of beams is True, False or "never"; `max_time` is in seconds.
    max_length: int = option(20, whole(1))
    max_new_tokens: int | None = option(None, optional(whole(1)))
    min_length: int = option(0, whole(0))
    min_new_tokens: int | None = option(None, optional(whole(0)))
    early_stopping: bool | str = option(False, v.early_stopping, purpose=BEAMS)
    max_time: float | None = option(None, optional(positive))
    stop_strings: str | tuple[str, ...] | None = option(
        None, optional(v.stop_strings), form=v.one_or_more
    )
    # The strategy.
    do_sample: bool = option(False, flag)
    num_beams: int = option(1, whole(1))
    num_beam_groups: int = option(1, whole(1), purpose=BEAMS)
    penalty_alpha: float | None = option(None, _share, purpose=CONTRASTIVE)
    low_memory: bool | None = option(None, optional(flag), purpose=CONTRASTIVE)
    num_assistant_tokens: int = option(5, whole(1), purpose=ASSISTANT)
    num_assistant_tokens_schedule: str = option(
        "heuristic",
        one_of(("heuristic", "constant"), "schedule"),
        purpose=ASSISTANT,
        foreign=("heuristic_transient",),
    )
    prompt_lookup_num_tokens: int | None = option(None, optional(whole(1)))
    max_matching_ngram_size: int | None = option(None, optional(whole(1)), purpose=LOOKUP)
    dola_layers: str | tuple[int, ...] | None = option(None, optional(v.dola_layers), form=v.tuples)
    force_words_ids: tuple[Any, ...] | None = option(None, optional(v.words), **_LISTED)
    # What is done to the scores.
    temperature: float = option(1.0, _scale, purpose=SAMPLING)
    top_k: int | None = option(50, optional(whole(0)), purpose=SAMPLING, none_counts=True)
    top_p: float | None = option(1.0, _share, purpose=SAMPLING, none_counts=True)
    min_p: float | None = option(None, _share, purpose=SAMPLING)
    typical_p: float | None = option(1.0, _share, purpose=SAMPLING, none_counts=True)
    epsilon_cutoff: float = option(0.0, probability, purpose=SAMPLING)
    eta_cutoff: float = option(0.0, probability, purpose=SAMPLING)
    diversity_penalty: float = option(0.0, _scale, purpose=BEAMS)
    repetition_penalty: float = option(1.0, _factor)
    encoder_repetition_penalty: float = option(1.0, _factor)  # of tokens not in the prompt
    length_penalty: float = option(1.0, number, purpose=BEAMS)
    no_repeat_ngram_size: int = option(0, whole(0))
    bad_words_ids: tuple[tuple[int, ...], ...] | None = option(
        None, optional(v.listed(v.ids)), **_LISTED
    )
    sequence_bias: Mapping[Any, float] | tuple[Any, ...] | None = (
        option(  # {token ids: bias} or [[token ids, bias], ...]
            None, optional(v.sequence_bias), form=v.bias_pairs, ids=v.biased
        )
    )
    renormalize_logits: bool = option(False, flag)
    forced_bos_token_id: int | None = option(None, token_id, ids=v.tokens)
    forced_eos_token_id: int | tuple[int, ...] | None = option(None, token_ids, **_LISTED)
    remove_invalid_values: bool = option(False, flag)
    exponential_decay_length_penalty: tuple[int, float] | None = option(
        None, optional(v.pair(whole(0), positive)), form=v.tuples
    )
    suppress_tokens: tuple[int, ...] | None = option(None, optional(v.ids), **_LISTED)
    begin_suppress_tokens: tuple[int, ...] | None = option(None, optional(v.ids), **_LISTED)
    forced_decoder_ids: tuple[tuple[int, int], ...] | None = option(
        None, optional(v.listed(v.pair(whole(0), whole(0)))), form=v.tuples, ids=v.forced
    )
    guidance_scale: float | None = option(None, optional(v.float32(number)))
    # How it is computed: "static" lets torch.compile serve all lengths; TF and Flax always do so.
    cache_implementation: str | None = option(
        None, optional(one_of(("static",), "kind of cache")), foreign=OTHER_CACHES
    )
    # What is returned.
    num_return_sequences: int = option(1, whole(1))
    output_attentions: bool = option(False, flag, purpose=RECORDS)
    output_hidden_states: bool = option(False, flag, purpose=RECORDS)
    output_scores: bool = option(False, flag, purpose=RECORDS)
    output_logits: bool = option(False, flag, purpose=RECORDS)
    return_dict_in_generate: bool = option(False, flag)
    # Special tokens.
    pad_token_id: int | None = option(None, token_id, ids=v.tokens, none_counts=True)
    bos_token_id: int | None = option(None, token_id, none_counts=True)
    eos_token_id: int | tuple[int, ...] | None = option(
        None, token_ids, none_counts=True, **_LISTED
    )
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    #: What a model's configuration said of generation when these became the model's own options.
    _followed: ClassVar[Mapping[str, Any] | None] = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTIONS:
            value = OPTIONS[name].read(name, value)
        elif name in OTHER_OPTIONS:
            name, value = "extra", {**self.extra, name: value}
        elif name != "extra":
            raise AttributeError(
                f"GenerationConfig has no option {name!r}.{did_you_mean(name, OPTIONS)} What belongs "
                "to another library can be put into `extra`."
            )
        object.__setattr__(self, name, value)
        object.__setattr__(self, "_followed", None)  # these are somebody's own now

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(dict.fromkeys(eos))

    def replace(self, **changes: Any) -> Self:
        """A validated copy; an option that does not exist is an error that names the nearest one.

        Raises:
            InputError: an unknown option.
            ConfigError: a value out of its range.
        """
        own = {key: value for key, value in changes.items() if key in OPTIONS}
        foreign = {key: value for key, value in changes.items() if key not in OPTIONS}
        for name in foreign:
            if name in CALL_ARGUMENTS:
                raise InputError(f"{name} is an argument of generate, not an option of its config.")
            if name not in OTHER_OPTIONS:
                hint = did_you_mean(name, [*OPTIONS, *CALL_ARGUMENTS])
                raise InputError(f"generate has no option {name!r}.{hint}")
        return dataclasses.replace(self, **own, extra={**self.extra, **foreign})

    @classmethod
    def of_call(
        cls, given: object, default: object, config: OPTConfig, options: Mapping[str, Any]
    ) -> GenerationConfig:
        """The options of a call: its arguments beat `generation_config=`, which beats the model's.

        Special tokens that `generation_config=` leaves out are the model's own; an argument None says
        that there is none.

        Args:
            given: the argument `generation_config`, or None.
            default: the model's own.
            config: the model's configuration.
            options: the other arguments.

        Raises:
            InputError: something else than a `GenerationConfig`, or an unknown option.
            ConfigError: a value out of its range.
        """
        own = _checked(default).updated(config, warn=given is None)
        if given is None:
            return own.replace(**options)
        given = _checked(given)
        left_out = {name for name in SPECIAL_TOKENS if getattr(given, name) is None}
        tokens = {name: getattr(own, name) for name in left_out.difference(options)}
        return given.replace(**tokens, **options)

    def following(self, config: OPTConfig) -> Self:
        """A copy as a model's own options: what is set in `config` later is used, with a warning.

        As in the reference, until the model is given others.
        """
        copy = dataclasses.replace(self)
        object.__setattr__(copy, "_followed", deepcopy(_generation_options(config)))
        return copy

    def updated(self, config: OPTConfig, *, warn: bool = False) -> Self:
        """The options with what was set in the model's configuration since they followed it."""
        if self._followed is None:
            return self
        changed = {
            name: value
            for name, value in _generation_options(config).items()
            if value != self._followed.get(name)
        }
        if changed and warn:
            warnings.warn(
                f"Generation is controlled by what was set in the model's configuration "
                f"({', '.join(sorted(changed))}). That is deprecated: set it in "
                "model.generation_config, or pass it to generate.",
                stacklevel=5,
            )
        return self.replace(**changed)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the JSON form; what is of other libraries, or says nothing, is kept in `extra`."""
        known = {
            key: value
            for key, value in values.items()
            if key in OPTIONS and value not in OPTIONS[key].foreign and value not in ([], {})
        }
        extra = {key: value for key, value in values.items() if key not in known}
        return cls(**known, extra=extra)

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        return cls.from_dict(read_json_object(Path(path)))

    @classmethod
    def from_model_config(cls, config: OPTConfig) -> Self:
        """The defaults of a model that brings no generation_config.json of its own."""
        return cls.from_dict(_generation_options(config)).following(config)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: what differs from the defaults, and the extras."""
        values = {name: getattr(self, name) for name in OPTIONS}
        own = {name: x for name, x in values.items() if x != OPTIONS[name].default}
        return {**self.extra, **own}

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes generation_config.json into `directory`, which is made if need be."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        atomic_write(Path(directory) / GENERATION_CONFIG_NAME, text)


def _checked(value: object) -> GenerationConfig:
    if not isinstance(value, GenerationConfig):
        raise InputError(
            f"generation_config: expected an opt_core.GenerationConfig, found {type(value).__name__}. "
            "GenerationConfig.from_dict makes one of a dictionary."
        )
    return value


def _generation_options(config: OPTConfig) -> dict[str, Any]:
    """What a model's configuration says of generation: its special tokens, and what old files hold."""
    legacy = {k: v for k, v in config.extra.items() if k in OPTIONS or k in OTHER_OPTIONS}
    ids = {"pad_token_id": config.pad_token_id, "bos_token_id": config.bos_token_id}
    return {**legacy, **ids, "eos_token_id": config.eos_token_id}


#: The table: every option by name.
OPTIONS: Mapping[str, Option] = {
    f.name: f.metadata["option"] for f in dataclasses.fields(GenerationConfig) if f.metadata
}
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
#: Options of the reference that are no fields here: name -> the value that says nothing, which is
#: the only one that OPT can have, or None where the option has no effect on one process with a cache.
OTHER_OPTIONS: Mapping[str, Any] = {
    "encoder_no_repeat_ngram_size": 0,
    "decoder_start_token_id": None,
    "generation_kwargs": {},
    "use_cache": None,
    "synced_gpus": None,
}
#: Arguments of `generate` that are objects, not data.
CALL_ARGUMENTS = (
    "input_ids",
    "generation_config",
    "attention_mask",
    "inputs_embeds",
    "past_key_values",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "constraints",
    "assistant_model",
    "streamer",
    "tokenizer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "seed",
    "noise",
)
