# SPDX-License-Identifier: Apache-2.0
"""`GenerationConfig`: what a caller may ask of `generate`, with the reference's defaults."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from opt_core.config import OPTConfig, read_json_object
from opt_core.errors import InputError
from opt_core.files import atomic_write
from opt_core.generation.values import CHECKS, NORMAL_FORMS, plain

GENERATION_CONFIG_NAME = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Options of text generation.

    Names and defaults are those of transformers 4.37.2 (`generation/configuration_utils.py`), and a
    few that later versions added: `min_p`, `stop_strings`, `output_logits`, `dola_layers`,
    `cache_implementation`. Lists become tuples; keys of other libraries are kept in `extra`.

    Raises:
        ConfigError: a value of the wrong kind or out of its range.
    """

    # Lengths, and what else ends a sequence.
    max_length: int = 20  # of prompt and new tokens together
    max_new_tokens: int | None = None  # beats max_length
    min_length: int = 0
    min_new_tokens: int | None = None
    early_stopping: bool | str = False  # of beams: True, False or "never"
    max_time: float | None = None  # seconds
    stop_strings: str | tuple[str, ...] | None = None
    # The strategy.
    do_sample: bool = False
    num_beams: int = 1
    num_beam_groups: int = 1
    penalty_alpha: float | None = None
    low_memory: bool | None = None
    num_assistant_tokens: int = 5
    num_assistant_tokens_schedule: str = "heuristic"
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    dola_layers: str | tuple[int, ...] | None = None
    force_words_ids: tuple[Any, ...] | None = None
    # What is done to the scores.
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    typical_p: float | None = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    diversity_penalty: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0  # of tokens that are not in the prompt
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    sequence_bias: Any = None  # {token ids: bias} or [[token ids, bias], ...]
    renormalize_logits: bool = False
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    forced_decoder_ids: tuple[tuple[int, int], ...] | None = None
    guidance_scale: float | None = None
    # How it is computed: "static" lets torch.compile serve all lengths; TF and Flax always do so.
    cache_implementation: str | None = None
    # What is returned.
    num_return_sequences: int = 1
    output_attentions: bool = False
    output_hidden_states: bool = False
    output_scores: bool = False
    output_logits: bool = False
    return_dict_in_generate: bool = False
    # Special tokens.
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    #: What a model's configuration said of generation when these became the model's own options.
    _followed: ClassVar[Mapping[str, Any] | None] = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = plain(getattr(self, field.name))
            if value is None and field.name not in MEANINGFUL_NONE:
                value = field.default  # None says nothing
            if field.name in CHECKS:
                CHECKS[field.name](field.name, value)
            if field.name in NORMAL_FORMS:
                value = NORMAL_FORMS[field.name](value)
            object.__setattr__(self, field.name, value)

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
        own = {key: value for key, value in changes.items() if key in FIELDS}
        foreign = {key: value for key, value in changes.items() if key not in FIELDS}
        for name in foreign:
            if name in CALL_ARGUMENTS:
                raise InputError(f"{name} is an argument of generate, not an option of its config.")
            if name not in OTHER_OPTIONS:
                close = difflib.get_close_matches(name, [*FIELDS, *CALL_ARGUMENTS], n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
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
        own = _checked(default)._updated(config, warn=given is None)
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
        object.__setattr__(copy, "_followed", _generation_options(config))
        return copy

    def _updated(self, config: OPTConfig, *, warn: bool) -> Self:
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
            if key in FIELDS and value not in FOREIGN.get(key, ()) and value not in ([], {})
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
        defaults = GenerationConfig()
        own = {f: getattr(self, f) for f in FIELDS if getattr(self, f) != getattr(defaults, f)}
        return {**self.extra, **own}

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes generation_config.json into `directory`."""
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
    legacy = {k: v for k, v in config.extra.items() if k in FIELDS or k in OTHER_OPTIONS}
    ids = {"pad_token_id": config.pad_token_id, "bos_token_id": config.bos_token_id}
    return {**legacy, **ids, "eos_token_id": config.eos_token_id}


SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
#: Fields in which None says something other than the default.
MEANINGFUL_NONE = ("top_k", "top_p", "typical_p", *SPECIAL_TOKENS)
FIELDS = tuple(f.name for f in dataclasses.fields(GenerationConfig) if f.name != "extra")
#: Values of later versions that a file may hold, which say how to compute, not what.
FOREIGN: Mapping[str, tuple[str, ...]] = {
    "cache_implementation": (
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
    ),
    "num_assistant_tokens_schedule": ("heuristic_transient",),
}
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
