# SPDX-License-Identifier: Apache-2.0
"""Jobs, plans, sizes, limits and targets of `benchmarks/gpu.py`: data only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from benchmarks.gpu_case import Case
from opt_core import OPTConfig
from opt_core.params import EMBEDDING_NAME, Kind, param_table

#: A small model, for a trial, with heads of the size that most published ones have.
TINY = "tiny"
TINY_CONFIG = OPTConfig(
    vocab_size=512,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=256,
    word_embed_proj_dim=128,
    max_position_embeddings=64,
)
#: Largest difference of two computations in the same dtype, relative to the largest number.
LIMITS = {"float16": 1e-2, "bfloat16": 5e-2}
#: The same of weights rounded to so many bits: coarse, to tell a mistake from a rounding.
ROUNDED_LIMITS = {"int8": 0.2, "int4": 0.5}
#: Bytes of a number in each kind of weights; int4 has a scale and a zero for each group of 128 or so.
WIDTHS = {"float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}


#: The size and length of which the targets of `FLASH_TARGETS` speak.
TARGET_SIZE, TARGET_LENGTH = "opt-2.7b", 2048
#: How many times faster flash is to be than another, and how many times less attention's memory.
FLASH_TARGETS = {"eager": 2.5, "memory": 3.0, "transformers": 1.0}


@dataclass(frozen=True)
class Job:
    """What is done in a section."""

    title: str
    dtype: str
    new: int = 0  # tokens after those of each row


JOBS: Mapping[str, Job] = {
    "inference": Job("FlashAttention in pure inference", "float16"),
    "decode": Job("decoding, batch 1", "bfloat16", 64),
    "prefill": Job("time to the first token", "bfloat16", 1),
    "training": Job("a training step", "bfloat16"),
}


@dataclass(frozen=True)
class Part:
    """Cases that one process measures: all batches of each length, plain and padded."""

    section: str
    size: str
    lengths: tuple[int, ...]  # tokens of each row; of decoding, of each prompt
    batches: tuple[int, ...] = (1,)
    padded: tuple[bool, ...] = (False,)
    framework: str = "torch"
    without: tuple[str, ...] = ()  # contestants that are left out
    seconds: float = 30.0  # a case takes: with less time left it is not begun

    def cases(self) -> list[Case]:
        return [
            Case(self.section, self.size, batch, length, padded, self.framework)
            for length in self.lengths
            for padded in self.padded
            for batch in self.batches
        ]


#: Those that compile for long, or need what is seldom installed.
SLOW = ("ours int8", "ours int4", "transformers static")
#: What the plots do not show.
UNSHOWN = ("transformers eager",)
#: What tells most, in this order, for a few minutes on one card: the two plots of the reference's page,
#: decoding, a training step, cuDNN's attention; then what there is time for.
FIRST = (
    Part("inference", "opt-2.7b", (2048, 512), (1, 4, 16), without=UNSHOWN, seconds=15),
    Part("inference", "opt-350m", (2048, 512), (1, 4, 16), without=UNSHOWN, seconds=10),
    Part("decode", "opt-125m", (32,), without=SLOW, seconds=20),
    Part("decode", "opt-2.7b", (32,), without=SLOW),
    Part("training", "opt-1.3b", (2048,), (8,)),
    Part("prefill", "opt-125m", (2047,), framework="flax", seconds=40),
    Part("prefill", "opt-125m", (2047,), seconds=15),
    Part("inference", "opt-2.7b", (2048,), (4,), (True,), without=UNSHOWN, seconds=15),
    Part("decode", "opt-125m", (32,), framework="flax", seconds=40),
    Part("training", "opt-1.3b", (2048,), (8,), framework="flax", seconds=60),
)
FRAMEWORKS = {"torch": "PyTorch", "flax": "JAX/Flax"}
DECODERS = ("opt-125m", "opt-2.7b", "opt-6.7b")
FULL = (
    *(
        Part("inference", size, (512, 2048), (1, 2, 4, 8, 16), padded=(False, True))
        for size in ("opt-350m", "opt-2.7b")
    ),
    *(Part("decode", size, (32,), framework=name) for size in DECODERS for name in FRAMEWORKS),
    *(
        Part("prefill", size, (512, 2047), framework=name)
        for size in DECODERS
        for name in FRAMEWORKS
    ),
    *(Part("training", "opt-1.3b", (2048,), (8,), framework=name) for name in FRAMEWORKS),
)
#: Lengths and new tokens of the small model, whose rows are short.
TINY_LENGTHS = {32: 8, 512: 16, 2047: 31, 2048: 32}
TINY_NEW = 6


def tiny(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The same with the small model, for a trial; each once."""
    small = (
        replace(
            part,
            size=TINY,
            lengths=tuple(TINY_LENGTHS[length] for length in part.lengths),
            batches=part.batches[:2],
        )
        for part in parts
    )
    return tuple({(part.section, part.framework, part.padded): part for part in small}.values())


def new_tokens(section: str, size: str) -> int:
    """How many tokens a case generates for each row."""
    return min(JOBS[section].new, TINY_NEW) if size == TINY else JOBS[section].new


#: Steps whose loss and gradients are compared have so many rows; so have passes whose logits are.
COMPARED_ROWS = 2
#: How many times faster the fastest of ours is to be than the peer's own way, by section and size.
PEER_TARGETS = {("decode", "opt-125m"): 6.0}
#: What share of the card's bandwidth or products the fastest of ours with plain weights is to reach.
SHARE_TARGETS = {
    ("decode", "opt-2.7b"): 0.8,
    ("decode", "opt-6.7b"): 0.8,
    ("training", "opt-1.3b"): 0.5,
}
#: How many times longer than PyTorch JAX may take.
FLAX_TARGET = 1.3


def config_of(size: str) -> OPTConfig:
    """A published size, or the small one."""
    return TINY_CONFIG if size == TINY else OPTConfig.preset(size)


def step_bytes(config: OPTConfig, matrices: float, others: float = 2.0) -> float:
    """What one step of decoding reads: all weights but the table of positions, the head included.

    Args:
        matrices: bytes of a number of the matrices that are multiplied; less than one, of the layers'
            alone, as the head has no less than the others.
        others: of biases and norms.
    """
    head = matrices if matrices >= WIDTHS["int8"] else others

    def width(name: str, kind: Kind) -> float:
        if name == EMBEDDING_NAME:
            return head
        return matrices if _multiplies(name, kind) else others

    return sum(
        math.prod(param.shape) * width(param.name, param.spec.kind)
        for param in param_table(config)
        if "embed_positions" not in param.name
    )


def forward_operations(config: OPTConfig, batch: int, length: int, *, head: bool) -> float:
    """Additions and multiplications of one forward pass over rows of `length` tokens.

    Two for each token and weight, and for each layer and row 4 T^2 D / 2 of causal attention: the
    count of Chowdhery et al. (arXiv:2204.02311, appendix B), but half of theirs in attention, since
    a query sees half of the keys.

    Args:
        head: whether the head runs on every token; otherwise it is left out.
    """
    weights = sum(
        math.prod(param.shape)
        for param in param_table(config)
        if _multiplies(param.name, param.spec.kind) and (head or param.name != EMBEDDING_NAME)
    )
    attention = 2 * config.num_hidden_layers * config.hidden_size * length**2
    return batch * (2.0 * weights * length + attention)


def training_operations(config: OPTConfig, batch: int, length: int) -> float:
    """Those of a step: the backward pass takes twice as many as the forward one."""
    return 3 * forward_operations(config, batch, length, head=True)


def _multiplies(name: str, kind: Kind) -> bool:
    """Whether a parameter is a matrix of a product; the tied head is the table of tokens."""
    return kind is Kind.LINEAR or name == EMBEDDING_NAME
