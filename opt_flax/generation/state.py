# SPDX-License-Identifier: Apache-2.0
"""What a decoding loop knows between two steps, and what it ends with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
from jax import Array

from opt_core.generation.plan import DecodePlan
from opt_flax.cache import KVCache

# A plan's numbers are told to a compiled loop when it runs; what else it says is what is compiled.
jax.tree_util.register_pytree_node(
    DecodePlan, lambda plan: (plan.numbers, plan.key), DecodePlan.with_numbers
)


class Inputs(NamedTuple):
    """What a loop starts from: the prompts, to the right of their padding."""

    tokens: Array  # [B or 2B, T]; the second half, if there is one, guides without the prompt
    mask: Array  # [B or 2B, T] 1 at real tokens, 0 at pads
    known: Array  # [B, T] the mask of columns whose tokens are known, not embeddings alone
    embeds: Array | None  # [B, T, E] instead of the tokens
    past: KVCache | None  # with room for all columns
    offset: Array  # columns before the first that counts
    limit: Array  # new tokens allowed


class StepOutput(NamedTuple):
    """What one call of the model gives a loop."""

    logits: Array  # [B, T, V]
    hidden_states: Any  # [B, T, E], from which the logits were made
    cache: Any  # KVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The rows so far, and the scores of what comes next.

    The prompts stand to the right of their padding, so that all rows end in the same column.
    """

    tokens: Array  # [B, S] prompts, then new tokens, then columns not yet filled
    mask: Array  # [B, S] 1 at tokens of prompts and wherever new ones go, 0 at pads
    length: Array  # columns filled, an int32 scalar
    prompt_length: int = field(metadata={"static": True})
    offset: Array  # columns before the first that counts
    limit: Array  # new tokens allowed
    finished: Array  # [B] whether the row has ended
    logits: Array  # [B, V] for the next column
    cache: Any  # KVCache
    unconditional: Array | None = None  # [B, V] logits without the prompt, for guidance
    scores: Array | None = None  # [B, V] from which the last column was chosen
    chosen: Array | None = None  # [B, any] tokens that earlier beam groups chose for this column
    context: Any = None  # [B, S, E] hidden states to compare candidates with

    @property
    def step(self) -> Array:
        """The number of new tokens."""
        return self.length - self.prompt_length

    def after(self, output: StepOutput) -> DecodeState:
        """The state after a call of the model, which may have had rows without prompts besides."""
        rows, logits = len(self.tokens), output.logits[:, -1]  # [B or 2B, V]
        unconditional = logits[rows:] if len(logits) > rows else None
        return replace(self, logits=logits[:rows], unconditional=unconditional, cache=output.cache)

    def take(self, rows: Array) -> DecodeState:
        """The state of some rows, without a cache or context."""
        return replace(
            self,
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            finished=self.finished[rows],
            logits=self.logits[rows],
            unconditional=None if self.unconditional is None else self.unconditional[rows],
            cache=None,
            context=None,
        )


class Decoded(NamedTuple):
    """What a loop ends with."""

    tokens: Array  # [B, any] new tokens, each row filled up with pads
    length: Array  # columns of it that are filled
    cache: Any  # KVCache
    sequences_scores: Array | None = None  # [B], of beams
    beam_indices: Array | None = None  # [B, any] the row of each step, -1 after the end; of beams
