# SPDX-License-Identifier: Apache-2.0
"""The OPT parameter table: every tensor of every OPT model, declared once.

Names, shapes, the frameworks' layouts, initial values, validation of checkpoints, tensor-parallel
splits, parameter counts and the table in docs/weights.md are all derived from it. Nothing else in
the project may spell out a parameter name.

Canonical are the names and the (out, in) layout of the Hugging Face PyTorch checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from opt_core.config import OPTConfig


class Kind(Enum):
    """What a parameter is. With the framework, it decides leaf name, axis order and initial value."""

    LINEAR = "linear"  # canonical layout (out, in)
    BIAS = "bias"
    EMBEDDING = "embedding"  # canonical layout (rows, features)
    NORM_SCALE = "norm scale"
    NORM_BIAS = "norm bias"


@dataclass(frozen=True)
class Convention:
    """How one framework stores one kind: the variable's own name, and whether it is transposed."""

    leaf: str
    transposed: bool = False


CONVENTIONS: Mapping[str, Mapping[Kind, Convention]] = {
    "torch": {
        Kind.LINEAR: Convention("weight"),
        Kind.BIAS: Convention("bias"),
        Kind.EMBEDDING: Convention("weight"),
        Kind.NORM_SCALE: Convention("weight"),
        Kind.NORM_BIAS: Convention("bias"),
    },
    "tf": {
        Kind.LINEAR: Convention("kernel", transposed=True),
        Kind.BIAS: Convention("bias"),
        Kind.EMBEDDING: Convention("embeddings"),
        Kind.NORM_SCALE: Convention("gamma"),
        Kind.NORM_BIAS: Convention("beta"),
    },
    "flax": {
        Kind.LINEAR: Convention("kernel", transposed=True),
        Kind.BIAS: Convention("bias"),
        Kind.EMBEDDING: Convention("embedding"),
        Kind.NORM_SCALE: Convention("scale"),
        Kind.NORM_BIAS: Convention("bias"),
    },
}
FRAMEWORKS = tuple(CONVENTIONS)
CANONICAL = CONVENTIONS["torch"]

#: The position table has two rows before position 0: row 1 is read at pads, row 0 never.
POSITION_OFFSET = 2
LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Axis:
    """A logical dimension: its size, and how the configuration says so."""

    size: Callable[[OPTConfig], int]
    origin: str  # the config's field, for messages
    unit: Callable[[OPTConfig], int] = lambda c: (
        1
    )  # a tensor-parallel split falls on multiples of it


AXES: Mapping[str, Axis] = {
    "vocab": Axis(lambda c: c.vocab_size, "vocab_size"),
    "position": Axis(
        lambda c: c.max_position_embeddings + POSITION_OFFSET,
        f"max_position_embeddings + {POSITION_OFFSET}",
    ),
    "word_embed": Axis(lambda c: c.word_embed_proj_dim, "word_embed_proj_dim"),
    "embed": Axis(lambda c: c.hidden_size, "hidden_size"),
    "heads": Axis(lambda c: c.hidden_size, "hidden_size", unit=lambda c: c.head_dim),
    "ffn": Axis(lambda c: c.ffn_dim, "ffn_dim"),
    "label": Axis(lambda c: c.num_labels, "num_labels"),
    "span": Axis(lambda c: 2, "start and end"),
}
SHARDED_AXES = frozenset({"vocab", "heads", "ffn"})  # split under tensor parallelism


def always(config: OPTConfig) -> bool:
    return True


def projects_embeddings(config: OPTConfig) -> bool:
    """Whether word embeddings are projected to the hidden size and back (opt-350m only)."""
    return config.word_embed_proj_dim != config.hidden_size


def has_final_norm(config: OPTConfig) -> bool:
    """Whether a layer norm follows the last layer (all published sizes but opt-350m)."""
    return config.do_layer_norm_before and not config._remove_final_layer_norm


def has_untied_head(config: OPTConfig) -> bool:
    return not config.tie_word_embeddings


@dataclass(frozen=True)
class ParamSpec:
    """One parameter (or one per layer, where `module` contains `{layer}`)."""

    module: str
    kind: Kind
    axes: tuple[str, ...]
    when: Callable[[OPTConfig], bool] = always

    @property
    def name(self) -> str:
        """Canonical name, e.g. `model.decoder.layers.{layer}.self_attn.q_proj.weight`."""
        return f"{self.module}.{CANONICAL[self.kind].leaf}"

    def shape(self, config: OPTConfig) -> tuple[int, ...]:
        """Shape in canonical layout."""
        return tuple(AXES[axis].size(config) for axis in self.axes)

    def explain(self, config: OPTConfig) -> str:
        """Where the shape comes from, for messages: `ffn_dim=3072, hidden_size=768`."""
        return ", ".join(f"{AXES[axis].origin}={AXES[axis].size(config)}" for axis in self.axes)

    @property
    def is_per_layer(self) -> bool:
        return "{layer}" in self.module

    def split_dim(self) -> int | None:
        """Dimension split under tensor parallelism, or None where the parameter is replicated."""
        return next((dim for dim, axis in enumerate(self.axes) if axis in SHARDED_AXES), None)


BASE_MODEL = "model"  # the attribute that holds the base model in every class with a head
DECODER = f"{BASE_MODEL}.decoder"
LAYER = f"{DECODER}.layers.{{layer}}"


def linear(
    module: str,
    out: str,
    in_: str,
    *,
    bias: bool = True,
    when: Callable[[OPTConfig], bool] = always,
) -> Iterator[ParamSpec]:
    yield ParamSpec(module, Kind.LINEAR, (out, in_), when)
    if bias:
        yield ParamSpec(module, Kind.BIAS, (out,), lambda c: when(c) and c.enable_bias)


def norm(module: str, *, when: Callable[[OPTConfig], bool] = always) -> Iterator[ParamSpec]:
    def affine(config: OPTConfig) -> bool:
        return when(config) and config.layer_norm_elementwise_affine

    yield ParamSpec(module, Kind.NORM_SCALE, ("embed",), affine)
    yield ParamSpec(module, Kind.NORM_BIAS, ("embed",), affine)


DECODER_PARAMS = (
    ParamSpec(f"{DECODER}.embed_tokens", Kind.EMBEDDING, ("vocab", "word_embed")),
    ParamSpec(f"{DECODER}.embed_positions", Kind.EMBEDDING, ("position", "embed")),
    *linear(f"{DECODER}.project_in", "embed", "word_embed", bias=False, when=projects_embeddings),
    *linear(f"{LAYER}.self_attn.q_proj", "heads", "embed"),
    *linear(f"{LAYER}.self_attn.k_proj", "heads", "embed"),
    *linear(f"{LAYER}.self_attn.v_proj", "heads", "embed"),
    *linear(f"{LAYER}.self_attn.out_proj", "embed", "heads"),
    *norm(f"{LAYER}.self_attn_layer_norm"),
    *linear(f"{LAYER}.fc1", "ffn", "embed"),
    *linear(f"{LAYER}.fc2", "embed", "ffn"),
    *norm(f"{LAYER}.final_layer_norm"),
    *norm(f"{DECODER}.final_layer_norm", when=has_final_norm),
    *linear(f"{DECODER}.project_out", "word_embed", "embed", bias=False, when=projects_embeddings),
)
HEAD_PARAMS: Mapping[str, tuple[ParamSpec, ...]] = {
    "OPTModel": (),
    "OPTForCausalLM": (
        *linear("lm_head", "vocab", "word_embed", bias=False, when=has_untied_head),
    ),
    "OPTForSequenceClassification": (*linear("score", "label", "word_embed", bias=False),),
    "OPTForQuestionAnswering": (
        ParamSpec("qa_outputs", Kind.LINEAR, ("span", "word_embed")),
        ParamSpec("qa_outputs", Kind.BIAS, ("span",)),  # whatever enable_bias says
    ),
}
ARCHITECTURES = tuple(HEAD_PARAMS)
EMBEDDING_NAME = DECODER_PARAMS[0].name
TIED_HEAD_NAME = HEAD_PARAMS["OPTForCausalLM"][0].name  # in a tied checkpoint: the embedding again


@dataclass(frozen=True)
class Param:
    """One tensor of one model: a row of the expanded table."""

    name: str  # canonical
    spec: ParamSpec
    shape: tuple[int, ...]  # canonical layout

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def in_base_model(self) -> bool:
        return self.name.startswith(f"{BASE_MODEL}.")

    def path(self, framework: str, architecture: str) -> tuple[str, ...]:
        """Attribute path in that framework's model, e.g. `("model", "decoder", ..., "kernel")`.

        A bare `OPTModel` is its own base, so its paths have no leading `model`.
        """
        path = (*self.module.split("."), CONVENTIONS[framework][self.spec.kind].leaf)
        return path[1:] if architecture == "OPTModel" else path

    def transposed(self, framework: str) -> bool:
        return CONVENTIONS[framework][self.spec.kind].transposed


def param_table(config: OPTConfig, architecture: str = "OPTForCausalLM") -> tuple[Param, ...]:
    """Every tensor that a model of this config has, in table order.

    A tied head is the embedding, so it has no row of its own.
    """
    specs = [s for s in (*DECODER_PARAMS, *HEAD_PARAMS[architecture]) if s.when(config)]
    return tuple(
        Param(spec.name.format(layer=layer), spec, spec.shape(config))
        for spec in specs
        for layer in (range(config.num_hidden_layers) if spec.is_per_layer else (None,))
    )


def num_parameters(config: OPTConfig, architecture: str = "OPTForCausalLM") -> int:
    """The number of scalars in a model of this config, the tied head counted once."""
    return sum(math.prod(param.shape) for param in param_table(config, architecture))
