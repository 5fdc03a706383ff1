# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding and sampling: one token after the other, each row for itself."""

from __future__ import annotations

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation.plan import DecodePlan
from opt_core.generation.watching import Watch
from opt_tf.generation.decode import Noise, Step, repeat, watched
from opt_tf.generation.processors import is_any_of, process
from opt_tf.generation.state import Decoded, DecodeState


def search(
    plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None, watch: Watch | None
) -> Decoded:
    """Takes the token with the highest score in each step, or samples where there is noise.

    Sampling is argmax(scores + noise) with Gumbel noise. A row that has ended continues with pads;
    the loop ends with the last row.
    """

    def goes_on(state: DecodeState) -> Tensor:
        return (state.step < state.limit) & ~tf.reduce_all(state.finished)

    def advance(state: DecodeState) -> DecodeState:
        rows = state.tokens.shape[0]
        token = tf.slice(state.tokens, (0, state.length - 1), (rows, 1))  # [B, 1]
        state = state.after(step(token, state.cache))
        return watched(choose(plan, state, noise), watch)

    state = watched(choose(plan, state, noise), watch)
    state = repeat(goes_on, advance, state, watch)
    return Decoded(state.tokens[:, plan.prompt_length :], state.step, state.cache)


def choose(plan: DecodePlan, state: DecodeState, noise: Noise | None) -> DecodeState:
    """The state with one more column: each row's best token, or a pad where the row has ended."""
    scores = process(plan.processors, state.logits, state)
    noisy = scores if noise is None else scores + noise(state.step)
    return append(plan, state, tf.argmax(noisy, axis=-1, output_type=tf.int32), scores)


def append(plan: DecodePlan, state: DecodeState, token: Tensor, scores: Tensor) -> DecodeState:
    """The state with a column of tokens [B] that were chosen from these scores."""
    token = tf.where(state.finished, plan.pad_token_id, token)
    tokens = keras.ops.slice_update(state.tokens, (0, state.length), token[:, None])
    finished = state.finished | is_any_of(token, plan.eos_token_ids)
    return state._replace(tokens=tokens, length=state.length + 1, finished=finished, scores=scores)
