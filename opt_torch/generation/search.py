# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding and sampling: one token after the other, each row for itself."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opt_core.generation.plan import DecodePlan
from opt_core.generation.watching import Watch
from opt_torch.generation.decode import Noise, Step, repeat, watched
from opt_torch.generation.processors import is_any_of, process
from opt_torch.generation.state import AT_HAND, Decoded, DecodeState

#: Where the host has to wait for values, it asks only every so many steps whether all rows have ended; what
#: was computed beyond the end is dropped.
PATIENCE = 16


def search(
    plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None, watch: Watch | None
) -> Decoded:
    """Takes the token with the highest score in each step, or samples where there is noise.

    Sampling is argmax(scores + noise) with Gumbel noise. A row that has ended continues with pads;
    the loop ends with the last row.
    """

    at_hand = watch is not None or state.tokens.device.type in AT_HAND
    patience = 1 if at_hand else PATIENCE

    def goes_on(state: DecodeState) -> bool:
        if state.step >= state.limit or state.step % patience:
            return state.step < state.limit
        return not bool(state.finished.all())

    def advance(state: DecodeState) -> DecodeState:
        token = state.tokens[:, state.length - 1 : state.length]  # [B, 1]
        state = state.after(step(token, state.cache))
        return watched(choose(plan, state, noise), watch)

    state = watched(choose(plan, state, noise), watch)
    state = repeat(goes_on, advance, state, watch)
    tokens, length = state.tokens[:, plan.prompt_length :], state.step
    if patience > 1:
        length = columns_until_end(plan, tokens[:, :length])
    return Decoded(tokens, length, state.cache)


def columns_until_end(plan: DecodePlan, tokens: Tensor) -> int:
    """How many columns of new tokens [B, any] there are until all rows have ended."""
    ends = is_any_of(tokens, plan.eos_token_ids)
    ended = ends.int().cumsum(dim=1) - ends.int() > 0  # before this column
    return int((~ended).any(dim=0).sum())


def choose(plan: DecodePlan, state: DecodeState, noise: Noise | None) -> DecodeState:
    """The state with one more column: each row's best token, or a pad where the row has ended."""
    scores = process(plan.processors, state.logits, state)
    noisy = scores if noise is None else scores + noise(state.step)
    return append(plan, state, noisy.argmax(-1), scores)


def append(plan: DecodePlan, state: DecodeState, token: Tensor, scores: Tensor) -> DecodeState:
    """The state with a column of tokens [B] that were chosen from these scores."""
    token = torch.where(state.finished, plan.pad_token_id, token)
    state.tokens[:, state.length] = token
    finished = state.finished | is_any_of(token, plan.eos_token_ids)
    return replace(state, length=state.length + 1, finished=finished, scores=scores)
