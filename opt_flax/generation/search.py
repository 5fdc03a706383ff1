# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding and sampling: one token after the other, each row for itself."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from opt_core.generation.plan import DecodePlan
from opt_core.generation.watching import Watch
from opt_flax.generation.decode import Noise, Step, repeat, watched
from opt_flax.generation.processors import process
from opt_flax.generation.programs import apart
from opt_flax.generation.state import Decoded, DecodeState


def search(
    plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None, watch: Watch | None
) -> Decoded:
    """Takes the token with the highest score in each step, or samples where there is noise.

    Sampling is argmax(scores + noise) with Gumbel noise. A row that has ended continues with pads;
    the loop ends with the last row.
    """

    def goes_on(state: DecodeState) -> Array:
        return (state.step < state.limit) & ~state.finished.all()

    def advance(state: DecodeState) -> DecodeState:
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)  # [B, 1]
        state = state.after(step(token, state.cache))
        return watched(choose(plan, state, noise), watch)

    state = watched(choose(plan, state, noise), watch)
    state = repeat(goes_on, advance, state, watch)
    return Decoded(state.tokens[:, plan.prompt_length :], state.step, state.cache)


def choose(plan: DecodePlan, state: DecodeState, noise: Noise | None) -> DecodeState:
    """The state with one more column: each row's best token, or a pad where the row has ended."""
    drawn = None if noise is None else noise(state.step)  # [B, V]
    # As one program where nothing around it is compiled, unless it holds code of the caller.
    run = chosen if plan.calls_back else apart(chosen)
    found = run(plan, replace(state, cache=None, context=None, scores=None), drawn)
    return replace(found, cache=state.cache, context=state.context)


def chosen(plan: DecodePlan, state: DecodeState, drawn: Array | None) -> DecodeState:
    """`choose`, with the noise of this step."""
    scores = process(plan.processors, state.logits, state)
    noisy = scores if drawn is None else scores + drawn
    return append(plan, state, noisy.argmax(-1), scores)


def append(plan: DecodePlan, state: DecodeState, token: Array, scores: Array) -> DecodeState:
    """The state with a column of tokens [B] that were chosen from these scores."""
    token = jnp.where(state.finished, plan.pad_token_id, token)
    tokens = state.tokens.at[:, state.length].set(token.astype(state.tokens.dtype))
    ends = jnp.array(plan.eos_token_ids, jnp.int32)
    finished = state.finished | jnp.isin(token, ends)
    return replace(state, tokens=tokens, length=state.length + 1, finished=finished, scores=scores)
