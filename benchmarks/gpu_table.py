# SPDX-License-Identifier: Apache-2.0
"""Sizes, jobs, limits and targets of `benchmarks/flash_attention.py` and `benchmarks/gpu.py`: data only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Inference:
    """One forward pass without gradients and cache, as on the reference's page."""

    sizes: tuple[str, ...]
    lengths: tuple[int, ...]
    batches: tuple[int, ...]


INFERENCE = Inference(("opt-350m", "opt-2.7b"), (512, 2048), (1, 2, 4, 8, 16))
TINY_INFERENCE = Inference((TINY,), (16, 32), (1, 2))
#: The size and length of which the targets of `FLASH_TARGETS` speak.
TARGET_SIZE, TARGET_LENGTH = "opt-2.7b", 2048
#: How many times faster flash is to be than another, and how many times less attention's memory.
FLASH_TARGETS = {"eager": 2.5, "memory": 3.0, "transformers": 1.0}


@dataclass(frozen=True)
class Job:
    """A section of `benchmarks/gpu.py`: rows of `length` tokens, `new` ones after each."""

    title: str
    sizes: tuple[str, ...]
    batch: int
    lengths: tuple[int, ...]
    new: int = 0


DECODERS = ("opt-125m", "opt-2.7b", "opt-6.7b")
JOBS: Mapping[str, Job] = {
    "decode": Job("decoding, batch 1", DECODERS, 1, (32,), 64),
    "prefill": Job("time to the first token", DECODERS, 1, (512, 2047), 1),
    "training": Job("a training step", ("opt-1.3b",), 8, (2048,)),
}
TINY_JOBS: Mapping[str, Job] = {
    "decode": Job("decoding, batch 1", (TINY,), 1, (8,), 6),
    "prefill": Job("time to the first token", (TINY,), 1, (16, 31), 1),
    "training": Job("a training step", (TINY,), 2, (32,)),
}
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
