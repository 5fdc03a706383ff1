# SPDX-License-Identifier: Apache-2.0
"""Contrastive search: the likeliest tokens are run, and compared with what stands before them."""

from __future__ import annotations

from dataclasses import replace

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation.plan import DecodePlan
from opt_core.generation.strategies import ContrastiveSearch
from opt_core.generation.watching import Watch
from opt_tf.cache import KVCache, LayerCache
from opt_tf.generation.decode import Noise, Step, in_halves, repeat, watched
from opt_tf.generation.processors import process
from opt_tf.generation.search import append
from opt_tf.generation.state import Decoded, DecodeState, StepOutput


def contrastive_search(
    plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None, watch: Watch | None
) -> Decoded:
    """Takes among the likeliest tokens the one most unlike what stands before it.

    `generation/utils.py:contrastive_search` of the reference, for each row as if it were alone. Each
    step runs its candidates: in K copies of each row, or with `low_memory` one after the other.
    """
    rows = tf.range(state.tokens.shape[0])  # [B]

    def goes_on(state: DecodeState) -> Tensor:
        return (state.step < state.limit) & ~tf.reduce_all(state.finished)

    def advance(state: DecodeState) -> DecodeState:
        scores = process(plan.processors, state.logits, state)
        probabilities, tokens = tf.math.top_k(tf.nn.softmax(scores), plan.strategy.top_k)
        directions, output = look_ahead(plan, tokens, state.cache, step, watch)
        best = rank(plan.strategy, state.context, directions, probabilities)  # [B]
        token, direction = (tf.gather(x, best, batch_dims=1) for x in (tokens, directions))
        context = keras.ops.slice_update(state.context, (0, state.length, 0), direction[:, None])
        state = watched(append(plan, state._replace(context=context), token, scores), watch)
        if output is None:
            return state.after(step(token[:, None], state.cache))
        return state.after(of_best(plan, output, best, watch))

    cache = state.cache
    if not plan.strategy.low_memory:
        copies = tf.repeat(rows, plan.strategy.top_k)
        cache = cache.take(in_halves(plan, copies, rows.shape[0]))
    context = _directions(state.context)
    # What a loop carries has its fields and dtypes from the beginning on.
    state = state._replace(context=context, scores=tf.cast(state.logits, tf.float32), cache=cache)
    state = repeat(goes_on, advance, state, watch)
    cache = None
    if watch is not None:
        watch.forget(1)  # the candidates for a token that is not asked for
        cache = _of_tokens(plan, state)
    return Decoded(state.tokens[:, plan.prompt_length :], state.step, cache)


def look_ahead(
    plan: DecodePlan, tokens: Tensor, cache: KVCache, step: Step, watch: Watch | None
) -> tuple[Tensor, StepOutput | None]:
    """Runs the candidates [B, K]; returns the directions [B, K, E] of their hidden states.

    And the output of all of them, where they ran side by side.
    """
    batch, count = tokens.shape
    if not plan.strategy.low_memory:
        rows = tf.repeat(tf.range(batch), count)
        output = step(tf.reshape(tokens, (-1, 1)), cache, rows)
        hidden_states = output.hidden_states[: batch * count]  # [B x K, 1, E]
        return tf.reshape(_directions(hidden_states), (batch, count, -1)), output

    def run(candidate: Tensor) -> Tensor:
        return _directions(step(candidate[:, None], cache).hidden_states[:batch, -1])  # [B, E]

    candidates = tf.transpose(tokens)  # [K, B]
    if watch is None:
        directions = tf.map_fn(run, candidates, fn_output_signature=tf.float32)
    else:
        directions = tf.stack([run(candidate) for candidate in candidates])
        watch.forget(count)
    return tf.transpose(directions, (1, 0, 2)), None


def rank(
    strategy: ContrastiveSearch, context: Tensor, directions: Tensor, probabilities: Tensor
) -> Tensor:
    """The best [B] of K candidates (arXiv:2202.06417, equation 5).

    Args:
        context: [B, S, E] of unit length.
        directions: [B, K, E] of unit length.
        probabilities: [B, K].
    """
    likeness = tf.reduce_max(tf.matmul(context, directions, transpose_b=True), axis=1)  # [B, K]
    alpha = strategy.penalty_alpha
    scores = (1 - alpha) * probabilities - alpha * likeness
    return tf.argmax(scores, axis=-1, output_type=tf.int32)


def of_best(plan: DecodePlan, output: StepOutput, best: Tensor, watch: Watch | None) -> StepOutput:
    """The output of the best [B] of K candidates each, and a cache in which all K copies hold it."""
    count = plan.strategy.top_k
    total = best.shape[0] * count
    rows = tf.range(best.shape[0]) * count + best  # [B]
    if watch is not None:
        watch.select(lambda x: tf.gather(x, rows))
    last, copies = output.cache.used - 1, in_halves(plan, tf.repeat(rows, count), total)

    def adopted(layer: LayerCache) -> LayerCache:
        rows, heads, _, size = layer.key.shape
        shape = (rows, heads, 1, size)
        key, value = (tf.gather(tf.slice(x, (0, 0, last, 0), shape), copies) for x in layer)
        return layer.extended(key, value, last)

    cache = replace(output.cache, layers=tuple(adopted(layer) for layer in output.cache.layers))
    rows = in_halves(plan, rows, total)
    return StepOutput(tf.gather(output.logits, rows), None, cache)


def _of_tokens(plan: DecodePlan, state: DecodeState) -> KVCache:
    """The cache of one copy of each row, without the last token, as other strategies leave it."""
    cache = state.cache
    if not plan.strategy.low_memory:
        count = plan.strategy.top_k
        rows = tf.range(state.tokens.shape[0]) * count
        cache = cache.take(in_halves(plan, rows, state.tokens.shape[0] * count))
    return replace(cache, length=cache.length - 1)


def _directions(hidden_states: Tensor) -> Tensor:
    """[..., E] of unit length, in float32."""
    return tf.math.l2_normalize(tf.cast(hidden_states, tf.float32), axis=-1)
