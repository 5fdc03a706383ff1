# SPDX-License-Identifier: Apache-2.0
"""`GenerationConfig`: what a caller may ask of `generate`, with the reference's defaults."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from opt_core.config import OPTConfig, read_json_object
from opt_core.errors import InputError
from opt_core.files import atomic_write
from opt_core.validation import (
    Check,
    flag,
    non_negative,
    optional,
    positive,
    probability,
    token_id,
    token_ids,
    whole,
)

GENERATION_CONFIG_NAME = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Options of text generation.

    Names and defaults are those of transformers 4.37.2 (`generation/configuration_utils.py`); those
    of them that opt-zoo does not have yet are kept in `extra` and refused by `plan` unless they say
    nothing.

    Raises:
        ConfigError: a value out of its range.
    """

    max_length: int = 20  # of prompt and new tokens together
    max_new_tokens: int | None = None  # beats max_length
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | tuple[int, ...] | None = None  # a list becomes a tuple
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and field.name not in _OPTIONAL:
                object.__setattr__(self, field.name, field.default)  # None says nothing
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    def replace(self, **changes: Any) -> Self:
        """A validated copy; an option that does not exist is an error that names the nearest one.

        Raises:
            InputError: an unknown option.
            ConfigError: a value out of its range.
        """
        own = {key: value for key, value in changes.items() if key in _FIELDS}
        foreign = {key: value for key, value in changes.items() if key not in _FIELDS}
        for name in foreign:
            if name not in UNSUPPORTED and name not in IGNORED:
                close = difflib.get_close_matches(name, [*_FIELDS, *UNSUPPORTED], n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise InputError(f"generate has no option {name!r}.{hint}")
        return dataclasses.replace(self, **own, extra={**self.extra, **foreign})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the JSON form; keys of other libraries are kept in `extra`."""
        known = {key: value for key, value in values.items() if key in _FIELDS}
        extra = {key: value for key, value in values.items() if key not in _FIELDS}
        return cls(**known, extra=extra)

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        return cls.from_dict(read_json_object(Path(path)))

    @classmethod
    def from_model_config(cls, config: OPTConfig) -> Self:
        """The defaults of a model that brings no generation_config.json of its own."""
        ids = {"pad_token_id": config.pad_token_id, "bos_token_id": config.bos_token_id}
        legacy = {k: v for k, v in config.extra.items() if k in _FIELDS or k in UNSUPPORTED}
        return cls.from_dict({**legacy, **ids, "eos_token_id": config.eos_token_id})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: what differs from the defaults, and the extras."""
        defaults = GenerationConfig()
        own = {f: getattr(self, f) for f in _FIELDS if getattr(self, f) != getattr(defaults, f)}
        return {**self.extra, **own}

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes generation_config.json into `directory`."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        atomic_write(Path(directory) / GENERATION_CONFIG_NAME, text)


#: Fields in which None says something other than the default.
_OPTIONAL = ("top_k", "top_p", "pad_token_id", "bos_token_id", "eos_token_id")
_FIELDS = tuple(f.name for f in dataclasses.fields(GenerationConfig) if f.name != "extra")
_CHECKS: Mapping[str, Check] = {
    "max_length": whole(1),
    "max_new_tokens": optional(whole(1)),
    "min_length": whole(0),
    "min_new_tokens": optional(whole(0)),
    "do_sample": flag,
    "temperature": non_negative,
    "top_k": optional(whole(0)),
    "top_p": optional(probability),
    "repetition_penalty": positive,
    "num_return_sequences": whole(1),
    "pad_token_id": token_id,
    "bos_token_id": token_id,
    "eos_token_id": token_ids,
}

#: Options of the reference that this release does not have: name -> the value that says nothing.
UNSUPPORTED: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "penalty_alpha": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_p": None,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "sequence_bias": None,
    "renormalize_logits": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_decoder_ids": None,
    "guidance_scale": None,
    "prompt_lookup_num_tokens": None,
    "prefix_allowed_tokens_fn": None,
    "logits_processor": None,
    "stopping_criteria": None,
    "stop_strings": None,
    "max_time": None,
    "streamer": None,
    "assistant_model": None,
    "inputs_embeds": None,
    "past_key_values": None,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict_in_generate": False,
}
#: Those of them that concern beams, and say nothing while there is one.
BEAM_OPTIONS = ("length_penalty", "early_stopping")
#: Accepted and without effect: decoding always has a cache, and never waits for other processes.
IGNORED = ("use_cache", "synced_gpus")
