# SPDX-License-Identifier: Apache-2.0
"""The logits processors as data: what to do to the scores, without a line of tensor code.

Each backend's `generation/processors.py` says how, under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LogitsProcessor:
    """One change to the scores [B, V] of the next token."""


@dataclass(frozen=True)
class RepetitionPenalty(LogitsProcessor):
    """Divides positive scores of tokens already in the row, and multiplies negative ones (CTRL)."""

    penalty: float


@dataclass(frozen=True)
class MinLength(LogitsProcessor):
    """No end of sequence before the row, padding included, has `length` tokens."""

    length: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class MinNewTokens(LogitsProcessor):
    """No end of sequence before `count` new tokens."""

    count: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Temperature(LogitsProcessor):
    """Divides the scores."""

    temperature: float


@dataclass(frozen=True)
class TopK(LogitsProcessor):
    """Keeps the `k` highest scores (and those equal to the lowest of them)."""

    k: int


@dataclass(frozen=True)
class TopP(LogitsProcessor):
    """Keeps the fewest highest scores whose probabilities sum to at least `p`; one at least."""

    p: float


PROCESSORS = (RepetitionPenalty, MinLength, MinNewTokens, Temperature, TopK, TopP)
