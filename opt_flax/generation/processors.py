# SPDX-License-Identifier: Apache-2.0
"""How each processor of `opt_core.generation.processors` changes the scores [B, V]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from opt_core.generation import processors as p
from opt_flax.generation.state import DecodeState


def repetition_penalty(processor: p.RepetitionPenalty, scores: Array, state: DecodeState) -> Array:
    filled = jnp.arange(state.tokens.shape[1]) < state.length  # [S]
    rows = jnp.arange(len(scores))[:, None]
    counts = jnp.zeros(scores.shape, state.mask.dtype)
    seen = counts.at[rows, state.tokens].add(state.mask * filled) > 0  # [B, V]
    penalty = processor.penalty
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def min_length(processor: p.MinLength, scores: Array, state: DecodeState) -> Array:
    return _forbid(scores, processor.eos_token_ids, state.length < processor.length)


def min_new_tokens(processor: p.MinNewTokens, scores: Array, state: DecodeState) -> Array:
    new_tokens = state.length - state.prompt_length
    return _forbid(scores, processor.eos_token_ids, new_tokens < processor.count)


def temperature(processor: p.Temperature, scores: Array, state: DecodeState) -> Array:
    return scores / processor.temperature


def top_k(processor: p.TopK, scores: Array, state: DecodeState) -> Array:
    lowest = jax.lax.top_k(scores, processor.k)[0][:, -1:]  # [B, 1]
    return jnp.where(scores < lowest, -jnp.inf, scores)


def top_p(processor: p.TopP, scores: Array, state: DecodeState) -> Array:
    order = jnp.argsort(scores, axis=-1, stable=True)
    ascending = jnp.take_along_axis(scores, order, axis=-1)
    total = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    drop = total <= 1 - processor.p
    drop = drop.at[:, -1].set(False)  # the most likely token always stays
    rows = jnp.arange(len(scores))[:, None]
    return jnp.where(jnp.zeros_like(drop).at[rows, order].set(drop), -jnp.inf, scores)


def _forbid(scores: Array, token_ids: tuple[int, ...], condition: Array) -> Array:
    forbidden = jnp.zeros(scores.shape[-1], bool)
    forbidden = forbidden.at[jnp.array(token_ids)].set(condition)
    return jnp.where(forbidden, -jnp.inf, scores)


APPLY: Mapping[type[p.LogitsProcessor], Callable[..., Array]] = {
    p.RepetitionPenalty: repetition_penalty,
    p.MinLength: min_length,
    p.MinNewTokens: min_new_tokens,
    p.Temperature: temperature,
    p.TopK: top_k,
    p.TopP: top_p,
}


def process(processors: tuple[p.LogitsProcessor, ...], scores: Array, state: DecodeState) -> Array:
    """Applies the processors in order to scores [B, V], in float32."""
    scores = scores.astype(jnp.float32)
    for processor in processors:
        scores = APPLY[type(processor)](processor, scores, state)
    return scores
