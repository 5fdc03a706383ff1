# SPDX-License-Identifier: Apache-2.0
"""What a decoding loop knows between two steps, and what it ends with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opt_torch.cache import KVCache

#: Devices whose values the host need not wait for.
AT_HAND = ("cpu",)


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """The host's values on the device, for which nobody waits."""
    return torch.from_numpy(array).to(device, non_blocking=True)


class Inputs(NamedTuple):
    """What a loop starts from: the prompts, to the right of their padding."""

    tokens: Tensor  # [B or 2B, T]; the second half, if there is one, guides without the prompt
    mask: Tensor  # [B or 2B, T] 1 at real tokens, 0 at pads
    known: Tensor  # [B, T] the mask of columns whose tokens are known, not embeddings alone
    embeds: Tensor | None  # [B, T, E] instead of the tokens
    past: KVCache | None  # with room for all columns
    offset: int  # columns before the first that counts
    limit: int  # new tokens allowed


class StepOutput(NamedTuple):
    """What one call of the model gives a loop."""

    logits: Tensor  # [B, T, V]
    hidden_states: Any  # [B, T, E], from which the logits were made
    cache: Any  # KVCache


@dataclass(frozen=True)
class DecodeState:
    """The rows so far, and the scores of what comes next.

    The prompts stand to the right of their padding, so that all rows end in the same column.
    """

    tokens: Tensor  # [B, S] prompts, then new tokens, then columns not yet filled
    mask: Tensor  # [B, S] 1 at tokens of prompts and wherever new ones go, 0 at pads
    length: int  # columns filled
    prompt_length: int
    offset: int  # columns before the first that counts
    limit: int  # new tokens allowed
    finished: Tensor  # [B] whether the row has ended
    logits: Tensor  # [B, V] for the next column
    cache: Any  # KVCache
    unconditional: Tensor | None = None  # [B, V] logits without the prompt, for guidance
    scores: Tensor | None = None  # [B, V] from which the last column was chosen
    chosen: Tensor | None = None  # [B, any] tokens that earlier beam groups chose for this column
    context: Any = None  # [B, S, E] hidden states to compare candidates with

    @property
    def step(self) -> int:
        """The number of new tokens."""
        return self.length - self.prompt_length

    def after(self, output: StepOutput) -> DecodeState:
        """The state after a call of the model, which may have had rows without prompts besides."""
        rows, logits = len(self.tokens), output.logits[:, -1]  # [B or 2B, V]
        unconditional = logits[rows:] if len(logits) > rows else None
        return replace(self, logits=logits[:rows], unconditional=unconditional, cache=output.cache)

    def take(self, rows: Tensor) -> DecodeState:
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

    tokens: Tensor  # [B, any] new tokens, each row filled up with pads
    length: int  # columns of it that are filled
    cache: Any  # KVCache
    sequences_scores: Tensor | None = None  # [B], of beams
    beam_indices: Tensor | None = None  # [B, any] the row of each step, -1 after the end; of beams
