# SPDX-License-Identifier: Apache-2.0
"""The processors that say which tokens are drawn from, and how likely each is: scores [B, V] alone."""

from __future__ import annotations

import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation import processors as p
from opt_tf.generation.state import DecodeState

_MINUS_INF = float("-inf")
#: So many of the likeliest tokens are looked at first: sorting all of them takes ten times as long.
_LIKELIEST = 1024


def temperature(processor: p.Temperature, scores: Tensor, state: DecodeState) -> Tensor:
    return scores / processor.temperature


def top_k(processor: p.TopK, scores: Tensor, state: DecodeState) -> Tensor:
    return tf.where(scores < _lowest_of(scores, processor.k), _MINUS_INF, scores)


def top_p(processor: p.TopP, scores: Tensor, state: DecodeState) -> Tensor:
    lowest = _lowest_of_mass(scores, scores, processor.p, processor.keep)
    return tf.where(scores < lowest, _MINUS_INF, scores)


def min_p(processor: p.MinP, scores: Tensor, state: DecodeState) -> Tensor:
    probabilities = tf.nn.softmax(scores, axis=-1)
    likeliest = tf.reduce_max(probabilities, axis=-1, keepdims=True)  # [B, 1]
    return _without(probabilities < processor.p * likeliest, scores, processor.keep)


def typical(processor: p.Typical, scores: Tensor, state: DecodeState) -> Tensor:
    log_probs = tf.nn.log_softmax(scores, axis=-1)
    ranks = -tf.abs(-log_probs - _entropy(log_probs))
    lowest = _lowest_of_mass(ranks, scores, processor.mass, processor.keep)
    return tf.where(ranks < lowest, _MINUS_INF, scores)


def epsilon(processor: p.Epsilon, scores: Tensor, state: DecodeState) -> Tensor:
    probabilities = tf.nn.softmax(scores, axis=-1)
    return _without(probabilities < processor.cutoff, scores, processor.keep)


def eta(processor: p.Eta, scores: Tensor, state: DecodeState) -> Tensor:
    log_probs = tf.nn.log_softmax(scores, axis=-1)
    adapted = processor.cutoff**0.5 * tf.exp(-_entropy(log_probs))  # [B, 1]
    cutoff = tf.minimum(adapted, processor.cutoff)
    return _without(tf.exp(log_probs) < cutoff, scores, processor.keep)


def renormalize(processor: p.Renormalize, scores: Tensor, state: DecodeState) -> Tensor:
    return tf.nn.log_softmax(scores, axis=-1)


def _lowest_of(scores: Tensor, count: int) -> Tensor:
    """The lowest [B, 1] of the highest scores."""
    highest = tf.math.top_k(scores, min(count, scores.shape[-1])).values
    # Not the last of them: XLA would make of top_k and such a slice a sort of all scores.
    return tf.reduce_min(highest, axis=-1, keepdims=True)


def _lowest_of_mass(ranks: Tensor, scores: Tensor, mass: float, keep: int) -> Tensor:
    """The lowest [B, 1] of the highest ranks [B, V] whose tokens have this probability together."""
    probabilities = tf.nn.softmax(scores, axis=-1)

    def lowest_among(count: int) -> tuple[Tensor, Tensor]:
        """The lowest rank [B, 1] if `count` tokens suffice, and whether they do."""
        highest, tokens = tf.math.top_k(ranks, count)  # [B, count]
        found = tf.gather(probabilities, tokens, batch_dims=1)
        before = tf.cumsum(found, axis=-1) - found
        kept = tf.reduce_sum(tf.cast(before < mass, tf.int32), axis=-1, keepdims=True)  # [B, 1]
        kept = tf.clip_by_value(kept, min(keep, count), count)
        lowest = tf.gather(highest, kept - 1, batch_dims=1)
        return lowest, tf.reduce_all(kept < count)

    vocab_size = scores.shape[-1]
    count = min(max(_LIKELIEST, keep), vocab_size)
    lowest, suffices = lowest_among(count)
    if count == vocab_size:
        return lowest
    return tf.cond(suffices, lambda: lowest, lambda: lowest_among(vocab_size)[0])


def _without(removed: Tensor, scores: Tensor, keep: int) -> Tensor:
    """Scores without some tokens [B, V], but with the `keep` likeliest."""
    return tf.where(removed & (scores < _lowest_of(scores, keep)), _MINUS_INF, scores)


def _entropy(log_probs: Tensor) -> Tensor:
    """Of each row, [B, 1]."""
    probabilities = tf.exp(log_probs)
    terms = tf.where(probabilities > 0, probabilities * log_probs, 0.0)
    return -tf.reduce_sum(terms, axis=-1, keepdims=True)
