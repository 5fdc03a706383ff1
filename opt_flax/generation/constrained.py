# SPDX-License-Identifier: Apache-2.0
"""Beam search under constraints: the host decides which rows go on, `opt_core` how."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from opt_core.generation.constrained import ConstrainedBeams
from opt_core.generation.plan import DecodePlan
from opt_core.generation.watching import Watch
from opt_flax.generation.decode import Noise, Step, in_halves, watched
from opt_flax.generation.processors import process
from opt_flax.generation.state import Decoded, DecodeState


def constrained_beam_search(
    plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None, watch: Watch | None
) -> Decoded:
    """Continues the best rows of each prompt on their way to fulfil the constraints.

    A prompt ends when it has as many sequences as rows that no other can surpass, or when the host
    ends all of its rows. There is never any noise.
    """
    tokens, mask = (np.asarray(x[:, : plan.prompt_length]) for x in (state.tokens, state.mask))
    beams = ConstrainedBeams(plan, tokens, mask, int(state.limit))
    state = shown(choose(plan, state, beams), beams, watch)
    while state.step < state.limit and not beams.finished.all():
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)  # [B, 1]
        state = state.after(step(token, state.cache))
        state = shown(choose(plan, state, beams), beams, watch)
    tokens, scores, indices = (jnp.asarray(x) for x in beams.found())
    return Decoded(tokens, tokens.shape[1], state.cache, scores, indices)


def choose(plan: DecodePlan, state: DecodeState, beams: ConstrainedBeams) -> DecodeState:
    """The state with one more column: the rows that go on; guides follow their rows."""
    logits = jax.nn.log_softmax(state.logits.astype(jnp.float32))
    scores = process(plan.processors, logits, state)
    totals = scores + beams.scores[:, None]  # [B, V]
    chosen = beams.choose(np.asarray(totals))
    rows, token = (jnp.asarray(x, jnp.int32) for x in chosen)  # [B]
    cache = state.cache
    if cache is not None:
        cache = cache.take(in_halves(plan, rows, len(rows)))
    tokens = state.tokens[rows].at[:, state.length].set(token)
    return replace(state, tokens=tokens, length=state.length + 1, cache=cache, scores=totals)


def shown(state: DecodeState, beams: ConstrainedBeams, watch: Watch | None) -> DecodeState:
    """Shows a state with a new column to the host, which may end all rows of a prompt."""
    finished = jnp.asarray(beams.finished)
    state = watched(replace(state, finished=finished), watch)
    beams.stop(np.asarray(state.finished))
    return state
