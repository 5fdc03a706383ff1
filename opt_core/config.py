# SPDX-License-Identifier: Apache-2.0
"""`OPTConfig`: the architecture of an OPT model, its validation, its JSON and the published sizes."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, overload

from opt_core.errors import ConfigError
from opt_core.files import JSON_LIMIT, atomic_write
from opt_core.presets import published_sizes
from opt_core.validation import (
    Check,
    did_you_mean,
    flag,
    non_negative,
    one_of,
    optional,
    probability,
    token_id,
    token_ids,
    whole,
)

CONFIG_NAME = "config.json"

#: Every activation that the reference knows (transformers 4.37.2, `activations.py:ACT2FN`).
ACTIVATIONS = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_pytorch_tanh",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)


#: What a configuration may say of generation, as those of transformers before 4.26 do.
GENERATION_OPTIONS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
)


@dataclasses.dataclass(init=False, eq=False, repr=False)
class OPTConfig:
    """The architecture and the defaults of an OPT model.

    The named arguments are those of the reference page with its defaults; they are validated
    together, here and nowhere else. Keyword arguments that OPT does not know are kept as attributes
    and written back to config.json. Two configs are equal if their JSON is.

    Raises:
        ConfigError: a value of the wrong type or range, heads that do not divide the hidden size,
            an unknown activation.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    ffn_dim: int
    max_position_embeddings: int
    do_layer_norm_before: bool
    _remove_final_layer_norm: bool
    word_embed_proj_dim: int
    dropout: float
    attention_dropout: float
    num_attention_heads: int
    activation_function: str
    layerdrop: float
    init_std: float
    use_cache: bool
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    enable_bias: bool
    layer_norm_elementwise_affine: bool
    tie_word_embeddings: bool
    return_dict: bool
    output_attentions: bool
    output_hidden_states: bool
    torch_dtype: str | None
    architectures: tuple[str, ...] | None
    id2label: dict[int, str]
    label2id: dict[str, int]
    problem_type: str | None
    tf_legacy_loss: bool
    name_or_path: str
    extra: dict[str, Any]

    model_type = "opt"

    def __init__(
        self,
        /,  # a file may have an entry of any name, even "self"
        vocab_size: int = 50272,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        ffn_dim: int = 3072,
        max_position_embeddings: int = 2048,
        do_layer_norm_before: bool = True,
        _remove_final_layer_norm: bool = False,
        word_embed_proj_dim: int | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        num_attention_heads: int = 12,
        activation_function: str = "relu",
        layerdrop: float = 0.0,
        init_std: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 2,
        eos_token_id: int | list[int] | tuple[int, ...] | None = 2,
        enable_bias: bool = True,
        layer_norm_elementwise_affine: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.ffn_dim = ffn_dim
        self.max_position_embeddings = max_position_embeddings
        self.do_layer_norm_before = do_layer_norm_before
        self._remove_final_layer_norm = _remove_final_layer_norm
        self.word_embed_proj_dim = (
            hidden_size if word_embed_proj_dim is None else word_embed_proj_dim
        )
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.num_attention_heads = num_attention_heads
        self.activation_function = activation_function
        self.layerdrop = layerdrop
        self.init_std = init_std
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = list(eos_token_id) if isinstance(eos_token_id, tuple) else eos_token_id
        self.enable_bias = enable_bias
        self.layer_norm_elementwise_affine = layer_norm_elementwise_affine
        self._set_common(kwargs)
        self.extra = kwargs
        self.validate()

    def _set_common(self, kwargs: dict[str, Any]) -> None:
        """Takes out of `kwargs` what every transformers configuration carries."""
        self.tie_word_embeddings = kwargs.pop("tie_word_embeddings", True)
        self.return_dict = kwargs.pop("return_dict", kwargs.pop("use_return_dict", True))
        self.output_attentions = kwargs.pop("output_attentions", False)
        self.output_hidden_states = kwargs.pop("output_hidden_states", False)
        dtype = kwargs.pop("dtype", None)  # transformers 5 writes "dtype"
        dtype = kwargs.pop("torch_dtype", None) or dtype
        self.torch_dtype = str(dtype).removeprefix("torch.") if dtype else None
        architectures = kwargs.pop("architectures", None) or ()
        if not isinstance(architectures, list | tuple) or not all(
            isinstance(name, str) for name in architectures
        ):
            raise ConfigError(
                f"architectures: expected a list of names, found {str(architectures)[:200]}."
            )
        self.architectures = tuple(architectures) or None
        self._set_labels(kwargs)
        self.problem_type = kwargs.pop("problem_type", None)
        self.tf_legacy_loss = kwargs.pop("tf_legacy_loss", False)
        self.name_or_path = kwargs.pop("_name_or_path", kwargs.pop("name_or_path", ""))
        for key in ("model_type", "transformers_version"):
            kwargs.pop(key, None)

    def _set_labels(self, kwargs: dict[str, Any]) -> None:
        id2label, label2id = kwargs.pop("id2label", None), kwargs.pop("label2id", None)
        num_labels = kwargs.pop("num_labels", None)
        optional(whole(0, _MAX_LABELS))("num_labels", num_labels)
        if id2label is None:
            id2label = {i: f"LABEL_{i}" for i in range(2 if num_labels is None else num_labels)}
        self.id2label = _checked_labels(id2label)
        if num_labels is not None and num_labels != len(self.id2label):
            raise ConfigError(
                f"num_labels={num_labels}, but id2label names {len(self.id2label)} labels. "
                "Give one of the two, or make them agree."
            )
        self.label2id = label2id or {label: i for i, label in self.id2label.items()}
        if not isinstance(self.label2id, Mapping):
            raise ConfigError(f"label2id: expected names and their ids, found {label2id!r}.")

    def validate(self) -> None:
        """Checks every field, and the fields against each other; raises ConfigError."""
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                f"{self.num_attention_heads}: every head needs the same whole size. "
                "Change one of the two."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ConfigError(
                f"pad_token_id={self.pad_token_id} lies outside the vocabulary "
                f"(vocab_size={self.vocab_size}). Use an id below {self.vocab_size}, or None."
            )

    # --- derived ---------------------------------------------------------------------------------

    @property
    def computation(self) -> tuple[Any, ...]:
        """All that the outputs follow from, in inference, besides the parameters and what is asked for."""
        return tuple(getattr(self, name) for name in _COMPUTED)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        self._set_labels({"num_labels": number})

    @property
    def use_return_dict(self) -> bool:
        return self.return_dict

    @property
    def _name_or_path(self) -> str:
        return self.name_or_path

    @_name_or_path.setter
    def _name_or_path(self, name: str) -> None:
        self.name_or_path = name

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids as a tuple, empty where there is none."""
        eos = self.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        hint = did_you_mean(name, [*FIELDS, *extra])
        raise AttributeError(f"OPTConfig has no attribute {name!r}.{hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIELDS or name in dir(type(self)):
            object.__setattr__(self, name, value)
        else:
            self.extra[name] = value

    def __contains__(self, name: str) -> bool:
        return name in FIELDS or name in self.extra

    def get(self, name: str, default: Any = None) -> Any:
        """The field or extra of that name, or `default` (adapter libraries read configs so)."""
        return getattr(self, name) if name in self else default

    # --- copies and JSON -------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The configuration of a published size by name, e.g. `OPTConfig.preset("opt-350m")`.

        Raises:
            ConfigError: an unknown name.
        """
        return cls(**{**published_sizes(name), **overrides})

    def replace(self, **changes: Any) -> Self:
        """A validated copy with `changes` applied."""
        return self.from_dict(self.to_dict(), **{"_name_or_path": self.name_or_path, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: all of OPT's own fields and whether the head is tied; of the rest what is set."""
        common: dict[str, Any] = {
            "architectures": list(self.architectures) if self.architectures else None,
            "return_dict": self.return_dict,
            "output_attentions": self.output_attentions,
            "output_hidden_states": self.output_hidden_states,
            "torch_dtype": self.torch_dtype,
            "problem_type": self.problem_type,
            "tf_legacy_loss": self.tf_legacy_loss,
        }
        common = {key: value for key, value in common.items() if value != _COMMON_DEFAULTS[key]}
        labels = ["LABEL_0", "LABEL_1"]
        if self.id2label != dict(enumerate(labels)) or [*self.label2id] != labels:
            common["id2label"] = {str(key): label for key, label in self.id2label.items()}
            common["label2id"] = dict(self.label2id)
        own = {name: getattr(self, name) for name in _OWN_FIELDS}
        return dict(sorted({**self.extra, **common, **own, "model_type": self.model_type}.items()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """Builds a config from its JSON form.

        Raises:
            ConfigError: the JSON is of another model, or its values are invalid.
        """
        model_type = values.get("model_type", "opt")
        if model_type != "opt":
            raise ConfigError(
                f"Expected a config of model_type 'opt', found {model_type!r}: "
                "this is not an OPT checkpoint."
            )
        merged = {**values, **overrides}
        if "num_labels" in overrides and "id2label" not in overrides:
            merged.pop("id2label", None)
            merged.pop("label2id", None)
        if merged.get("dtype") is not None and "torch_dtype" in overrides:
            merged.pop("dtype")
        return cls(**merged)

    def to_json_string(self) -> str:
        try:
            return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        except TypeError as error:
            raise ConfigError(
                f"A value of this config cannot be written as JSON: {error}"
            ) from error

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str], **overrides: Any) -> Self:
        """Reads a config.json.

        Raises:
            ConfigError: no JSON object, another model's config, or invalid values.
        """
        return cls.from_dict(read_json_object(Path(path)), **overrides)

    @overload
    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        return_unused_kwargs: Literal[False] = False,
        **overrides: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        return_unused_kwargs: Literal[True],
        **overrides: Any,
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Reads the config.json of a directory or of a model on the hub; keywords override it.

        Args:
            name_or_path: the directory, or the name on the hub.
            return_unused_kwargs: returns (config, what is none of its fields) instead of a warning
                that names it.
            overrides: fields with other values; and where to look: revision, subfolder, token,
                cache_dir, local_files_only, force_download.

        Raises:
            HubError: nothing found under that name.
            ConfigError: no configuration there, or an invalid one.
        """
        from opt_core.hub import resolve, take_hub_options

        directory = resolve(name_or_path, **take_hub_options(overrides), weights=False)
        path = directory / CONFIG_NAME
        if not path.is_file():
            raise ConfigError(f"{directory} holds no {CONFIG_NAME}. Is it a model directory?")
        values = read_json_object(path)
        known = _known_names(values)
        unused = {key: overrides.pop(key) for key in [*overrides] if key not in known}
        config = cls.from_dict(values, **{"_name_or_path": str(name_or_path), **overrides})
        if return_unused_kwargs:
            return config, unused
        for name in unused:
            warnings.warn(
                f"OPTConfig.from_pretrained: {name} is ignored, since it is no field of this "
                f"configuration.{did_you_mean(name, known)} Set config.{name} to add it.",
                stacklevel=2,
            )
        return config

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json into `directory`, which is made if need be."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        atomic_write(Path(directory) / CONFIG_NAME, self.to_json_string())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OPTConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:  # by content, so that a compiled function may be keyed by it
        return hash(self.to_json_string())

    def __repr__(self) -> str:
        return f"OPTConfig {self.to_json_string()}"


def _known_names(values: Mapping[str, Any]) -> list[str]:
    """What may be overridden when a file is read: fields, what it holds, options of generation."""
    fields = (name for name in FIELDS if name != "extra")
    others = ("_name_or_path", "dtype", "num_labels", "use_return_dict")
    return [*fields, *others, *GENERATION_OPTIONS, *values]


def _checked_labels(labels: Any) -> dict[int, str]:
    """The names of labels by their ids, which JSON has as strings; raises ConfigError."""
    try:
        names = {int(key): label for key, label in dict(labels).items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"id2label: expected ids and their names, found {labels!r}.") from error
    if not all(isinstance(label, str | int) for label in names.values()):
        raise ConfigError(f"id2label: expected a name for each id, found {labels!r}.")
    return names


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that must hold an object.

    Raises:
        ConfigError: not UTF-8, not JSON, or not an object; names the file and the place.
    """
    if path.stat().st_size > JSON_LIMIT:
        raise ConfigError(
            f"{path}: expected at most {JSON_LIMIT} bytes, found more. Is it damaged?"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # digits or brackets without end, too
        raise ConfigError(f"{path} is not valid JSON: {error}. Fetch or write it again.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}.")
    return values


FIELDS = tuple(field.name for field in dataclasses.fields(OPTConfig))
#: Always in the JSON: the reference page's arguments, and what adapter libraries look for.
_OWN_FIELDS = FIELDS[: FIELDS.index("tie_word_embeddings") + 1]
_COMPUTED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "ffn_dim",
    "max_position_embeddings",
    "do_layer_norm_before",
    "_remove_final_layer_norm",
    "word_embed_proj_dim",
    "num_attention_heads",
    "activation_function",
    "pad_token_id",
    "enable_bias",
    "layer_norm_elementwise_affine",
    "tie_word_embeddings",
)
_COMMON_DEFAULTS: Mapping[str, Any] = {
    "architectures": None,
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "torch_dtype": None,
    "problem_type": None,
    "tf_legacy_loss": False,
}
_MAX_LABELS = 100_000
_CHECKS: Mapping[str, Check] = {
    "vocab_size": whole(1),
    "hidden_size": whole(1),
    "num_hidden_layers": whole(0, 1000),  # ten times the largest: the parameter table is that long
    "ffn_dim": whole(1),
    "max_position_embeddings": whole(1),
    "word_embed_proj_dim": whole(1),
    "num_attention_heads": whole(1),
    "do_layer_norm_before": flag,
    "_remove_final_layer_norm": flag,
    "use_cache": flag,
    "enable_bias": flag,
    "layer_norm_elementwise_affine": flag,
    "tie_word_embeddings": flag,
    "return_dict": flag,
    "output_attentions": flag,
    "output_hidden_states": flag,
    "dropout": probability,
    "attention_dropout": probability,
    "layerdrop": probability,
    "init_std": non_negative,
    "pad_token_id": token_id,
    "bos_token_id": token_id,
    "eos_token_id": token_ids,
    "activation_function": one_of(ACTIVATIONS, "activation"),
}
