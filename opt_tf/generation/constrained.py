# SPDX-License-Identifier: Apache-2.0
"""Beam search under constraints: the host decides which rows go on, `opt_core` how."""

from __future__ import annotations

import keras
import tensorflow as tf

from opt_core.generation.constrained import ConstrainedBeams
from opt_core.generation.plan import DecodePlan
from opt_core.generation.watching import Watch
from opt_tf.generation.decode import Noise, Step, in_halves, watched
from opt_tf.generation.processors import process
from opt_tf.generation.state import Decoded, DecodeState


def constrained_beam_search(
    plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None, watch: Watch | None
) -> Decoded:
    """Continues the best rows of each prompt on their way to fulfil the constraints.

    A prompt ends when it has as many sequences as rows that no other can surpass, or when the host
    ends all of its rows. There is never any noise.
    """
    tokens, mask = (x[:, : plan.prompt_length].numpy() for x in (state.tokens, state.mask))
    beams = ConstrainedBeams(plan, tokens, mask, int(state.limit))
    state = shown(choose(plan, state, beams), beams, watch)
    while state.step < state.limit and not beams.finished.all():
        length = int(state.length)
        token = state.tokens[:, length - 1 : length]  # [B, 1]
        state = state.after(step(token, state.cache))
        state = shown(choose(plan, state, beams), beams, watch)
    tokens, scores, indices = (tf.constant(x) for x in beams.found())
    return Decoded(tokens, tokens.shape[1], state.cache, scores, indices)


def choose(plan: DecodePlan, state: DecodeState, beams: ConstrainedBeams) -> DecodeState:
    """The state with one more column: the rows that go on; guides follow their rows."""
    logits = tf.nn.log_softmax(tf.cast(state.logits, tf.float32))
    scores = process(plan.processors, logits, state)
    totals = scores + beams.scores[:, None]  # [B, V]
    chosen = beams.choose(totals.numpy())
    rows, token = (tf.constant(x, tf.int32) for x in chosen)  # [B]
    cache = state.cache
    if cache is not None:
        cache = cache.take(in_halves(plan, rows, rows.shape[0]))
    tokens = tf.gather(state.tokens, rows)
    tokens = keras.ops.slice_update(tokens, (0, state.length), token[:, None])
    return state._replace(tokens=tokens, length=state.length + 1, cache=cache, scores=totals)


def shown(state: DecodeState, beams: ConstrainedBeams, watch: Watch | None) -> DecodeState:
    """Shows a state with a new column to the host, which may end all rows of a prompt."""
    finished = tf.constant(beams.finished)
    state = watched(state._replace(finished=finished), watch)
    beams.stop(state.finished.numpy())
    return state
