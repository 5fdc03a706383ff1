# SPDX-License-Identifier: Apache-2.0
"""How each processor of `opt_core.generation.processors` changes the scores [B, V]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation import processors as p
from opt_tf.generation.state import DecodeState

_MINUS_INF = float("-inf")


def repetition_penalty(
    processor: p.RepetitionPenalty, scores: Tensor, state: DecodeState
) -> Tensor:
    columns = tf.range(tf.shape(state.tokens)[1])
    mask = state.mask * tf.cast(columns < state.length, state.mask.dtype)  # [B, S]
    rows = tf.broadcast_to(tf.range(tf.shape(mask)[0])[:, None], tf.shape(mask))
    counts = tf.zeros(tf.shape(scores), mask.dtype)
    places = tf.stack([rows, tf.cast(state.tokens, rows.dtype)], axis=-1)  # [B, S, 2]
    seen = tf.tensor_scatter_nd_add(counts, places, mask) > 0  # [B, V]
    penalty = processor.penalty
    return tf.where(seen, tf.where(scores < 0, scores * penalty, scores / penalty), scores)


def min_length(processor: p.MinLength, scores: Tensor, state: DecodeState) -> Tensor:
    return _forbid(scores, processor.eos_token_ids, state.length < processor.length)


def min_new_tokens(processor: p.MinNewTokens, scores: Tensor, state: DecodeState) -> Tensor:
    new_tokens = state.length - state.prompt_length
    return _forbid(scores, processor.eos_token_ids, new_tokens < processor.count)


def temperature(processor: p.Temperature, scores: Tensor, state: DecodeState) -> Tensor:
    return scores / processor.temperature


def top_k(processor: p.TopK, scores: Tensor, state: DecodeState) -> Tensor:
    lowest = tf.math.top_k(scores, processor.k).values[:, -1:]  # [B, 1]
    return tf.where(scores < lowest, _MINUS_INF, scores)


def top_p(processor: p.TopP, scores: Tensor, state: DecodeState) -> Tensor:
    order = tf.argsort(scores, stable=True)
    ascending = tf.gather(scores, order, batch_dims=1)
    total = tf.cumsum(tf.nn.softmax(ascending), axis=-1)
    drop = total <= 1 - processor.p
    # The most likely token always stays.
    drop = tf.concat([drop[:, :-1], tf.zeros_like(drop[:, -1:])], axis=1)
    drop = tf.gather(drop, tf.argsort(order), batch_dims=1)
    return tf.where(drop, _MINUS_INF, scores)


def _forbid(scores: Tensor, token_ids: tuple[int, ...], condition: Tensor) -> Tensor:
    forbidden = is_any_of(tf.range(tf.shape(scores)[-1]), token_ids) & condition
    return tf.where(forbidden, _MINUS_INF, scores)


def is_any_of(tokens: Tensor, token_ids: tuple[int, ...]) -> Tensor:
    """Whether each token is one of the ids."""
    ids = tf.constant(token_ids, tokens.dtype, (len(token_ids),))
    return tf.reduce_any(tokens[..., None] == ids, axis=-1)


APPLY: Mapping[type[p.LogitsProcessor], Callable[..., Tensor]] = {
    p.RepetitionPenalty: repetition_penalty,
    p.MinLength: min_length,
    p.MinNewTokens: min_new_tokens,
    p.Temperature: temperature,
    p.TopK: top_k,
    p.TopP: top_p,
}


def process(
    processors: tuple[p.LogitsProcessor, ...], scores: Tensor, state: DecodeState
) -> Tensor:
    """Applies the processors in order to scores [B, V], in float32."""
    scores = tf.cast(scores, tf.float32)
    for processor in processors:
        scores = APPLY[type(processor)](processor, scores, state)
    return scores
