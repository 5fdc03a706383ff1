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
from opt_core.errors import ConfigError, InputError
from opt_core.files import atomic_write

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
        for name, (valid, expected) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not valid(value):
                raise ConfigError(f"{name}: expected {expected}, found {value!r}.")

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
            if name not in UNSUPPORTED:
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
        legacy = {key: value for key, value in config.extra.items() if key in _FIELDS}
        return cls(**{**legacy, **ids, "eos_token_id": config.eos_token_id})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: what differs from the defaults, and the extras."""
        defaults = GenerationConfig()
        own = {f: getattr(self, f) for f in _FIELDS if getattr(self, f) != getattr(defaults, f)}
        return {**self.extra, **own}

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes generation_config.json into `directory`."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        atomic_write(Path(directory) / GENERATION_CONFIG_NAME, text)


def _whole(minimum: int, none: bool = False) -> tuple[Any, str]:
    return (
        lambda v: (none and v is None) or (isinstance(v, int) and v >= minimum),
        f"a whole number from {minimum} on{' or None' if none else ''}",
    )


_FIELDS = tuple(f.name for f in dataclasses.fields(GenerationConfig) if f.name != "extra")
_RANGES = {
    "max_length": _whole(1),
    "max_new_tokens": _whole(1, none=True),
    "min_length": _whole(0),
    "min_new_tokens": _whole(0, none=True),
    "temperature": (
        lambda v: isinstance(v, int | float) and 0 < v < float("inf"),
        "a number above 0 (for greedy decoding, leave do_sample=False)",
    ),
    "top_k": _whole(0, none=True),
    "top_p": (
        lambda v: v is None or (isinstance(v, int | float) and 0 <= v <= 1),
        "a number from 0 to 1",
    ),
    "repetition_penalty": (
        lambda v: isinstance(v, int | float) and 0 < v < float("inf"),
        "a number above 0 (1 is no penalty)",
    ),
    "num_return_sequences": _whole(1),
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
    "use_cache": True,
}
