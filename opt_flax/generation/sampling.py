# SPDX-License-Identifier: Apache-2.0
"""The processors that say which tokens are drawn from, and how likely each is: scores [B, V] alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from opt_core.generation import processors as p
from opt_flax.generation.state import DecodeState

#: So many of the likeliest tokens are looked at first: sorting all of them takes ten times as long.
_LIKELIEST = 1024


def temperature(processor: p.Temperature, scores: Array, state: DecodeState) -> Array:
    return scores / processor.temperature


def top_k(processor: p.TopK, scores: Array, state: DecodeState) -> Array:
    return jnp.where(scores < _lowest_of(scores, processor.k), -jnp.inf, scores)


def top_p(processor: p.TopP, scores: Array, state: DecodeState) -> Array:
    lowest = _lowest_of_mass(scores, scores, processor.p, processor.keep)
    return jnp.where(scores < lowest, -jnp.inf, scores)


def min_p(processor: p.MinP, scores: Array, state: DecodeState) -> Array:
    probabilities = jax.nn.softmax(scores, axis=-1)
    likeliest = jnp.max(probabilities, axis=-1, keepdims=True)  # [B, 1]
    return _without(probabilities < processor.p * likeliest, scores, processor.keep)


def typical(processor: p.Typical, scores: Array, state: DecodeState) -> Array:
    log_probs = jax.nn.log_softmax(scores, axis=-1)
    ranks = -jnp.abs(-log_probs - _entropy(log_probs))
    lowest = _lowest_of_mass(ranks, scores, processor.mass, processor.keep)
    return jnp.where(ranks < lowest, -jnp.inf, scores)


def epsilon(processor: p.Epsilon, scores: Array, state: DecodeState) -> Array:
    probabilities = jax.nn.softmax(scores, axis=-1)
    return _without(probabilities < processor.cutoff, scores, processor.keep)


def eta(processor: p.Eta, scores: Array, state: DecodeState) -> Array:
    log_probs = jax.nn.log_softmax(scores, axis=-1)
    adapted = processor.cutoff**0.5 * jnp.exp(-_entropy(log_probs))  # [B, 1]
    cutoff = jnp.minimum(adapted, processor.cutoff)
    return _without(jnp.exp(log_probs) < cutoff, scores, processor.keep)


def renormalize(processor: p.Renormalize, scores: Array, state: DecodeState) -> Array:
    return jax.nn.log_softmax(scores, axis=-1)


def _lowest_of(scores: Array, count: int) -> Array:
    """The lowest [B, 1] of the highest scores."""
    highest = jax.lax.top_k(scores, min(count, scores.shape[-1]))[0]
    # Not the last of them: XLA would make of top_k and such a slice a sort of all scores.
    return jnp.min(highest, axis=-1, keepdims=True)


def _lowest_of_mass(ranks: Array, scores: Array, mass: float, keep: int) -> Array:
    """The lowest [B, 1] of the highest ranks [B, V] whose tokens have this probability together."""
    probabilities = jax.nn.softmax(scores, axis=-1)

    def lowest_among(count: int) -> tuple[Array, Array]:
        """The lowest rank [B, 1] if `count` tokens suffice, and whether they do."""
        highest, tokens = jax.lax.top_k(ranks, count)  # [B, count]
        found = jnp.take_along_axis(probabilities, tokens, axis=1)
        before = jnp.cumsum(found, axis=-1) - found
        kept = jnp.sum(before < mass, axis=-1, keepdims=True)  # [B, 1]
        kept = jnp.clip(kept, min(keep, count), count)
        lowest = jnp.take_along_axis(highest, kept - 1, axis=1)
        return lowest, jnp.all(kept < count)

    vocab_size = scores.shape[-1]
    count = min(max(_LIKELIEST, keep), vocab_size)
    lowest, suffices = lowest_among(count)
    if count == vocab_size:
        return lowest
    return jax.lax.cond(suffices, lambda: lowest, lambda: lowest_among(vocab_size)[0])


def _without(removed: Array, scores: Array, keep: int) -> Array:
    """Scores without some tokens [B, V], but with the `keep` likeliest."""
    return jnp.where(removed & (scores < _lowest_of(scores, keep)), -jnp.inf, scores)


def _entropy(log_probs: Array) -> Array:
    """Of each row, [B, 1]."""
    probabilities = jnp.exp(log_probs)
    terms = jnp.where(probabilities > 0, probabilities * log_probs, 0.0)
    return -jnp.sum(terms, axis=-1, keepdims=True)
