# SPDX-License-Identifier: Apache-2.0
"""Contrastive search: the likeliest tokens are run, and compared with what stands before them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from opt_core.generation.plan import DecodePlan
from opt_core.generation.strategies import ContrastiveSearch
from opt_core.generation.watching import Watch
from opt_flax.cache import KVCache, LayerCache
from opt_flax.generation.decode import Noise, Step, in_halves, repeat, watched
from opt_flax.generation.processors import process
from opt_flax.generation.search import append
from opt_flax.generation.state import Decoded, DecodeState, StepOutput


def contrastive_search(
    plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None, watch: Watch | None
) -> Decoded:
    """Takes among the likeliest tokens the one most unlike what stands before it.

    `generation/utils.py:contrastive_search` of the reference, for each row as if it were alone. Each
    step runs its candidates: in K copies of each row, or with `low_memory` one after the other.
    """
    rows = jnp.arange(len(state.tokens))  # [B]

    def goes_on(state: DecodeState) -> Array:
        return (state.step < state.limit) & ~state.finished.all()

    def advance(state: DecodeState) -> DecodeState:
        scores = process(plan.processors, state.logits, state)
        probabilities, tokens = jax.lax.top_k(jax.nn.softmax(scores), plan.strategy.top_k)
        directions, output = look_ahead(plan, tokens, state.cache, step, watch)
        best = rank(plan.strategy, state.context, directions, probabilities)  # [B]
        context = state.context.at[:, state.length].set(directions[rows, best])
        state = replace(state, context=context)
        state = watched(append(plan, state, tokens[rows, best], scores), watch)
        if output is None:
            return state.after(step(tokens[rows, best][:, None], state.cache))
        return state.after(of_best(plan, output, best, watch))

    cache = state.cache
    if not plan.strategy.low_memory:
        copies = jnp.repeat(rows, plan.strategy.top_k)
        cache = cache.take(in_halves(plan, copies, len(rows)))
    context = _directions(state.context)
    # What a loop carries has its fields and dtypes from the beginning on.
    state = replace(state, context=context, scores=state.logits.astype(jnp.float32), cache=cache)
    state = repeat(goes_on, advance, state, watch)
    cache = None
    if watch is not None:
        watch.forget(1)  # the candidates for a token that is not asked for
        cache = _of_tokens(plan, state)
    return Decoded(state.tokens[:, plan.prompt_length :], state.step, cache)


def look_ahead(
    plan: DecodePlan, tokens: Array, cache: KVCache, step: Step, watch: Watch | None
) -> tuple[Array, StepOutput | None]:
    """Runs the candidates [B, K]; returns the directions [B, K, E] of their hidden states.

    And the output of all of them, where they ran side by side.
    """
    batch, count = tokens.shape
    if not plan.strategy.low_memory:
        rows = jnp.repeat(jnp.arange(batch), count)
        output = step(tokens.reshape(-1, 1), cache, rows)
        hidden_states = output.hidden_states[: batch * count]  # [B x K, 1, E]
        return _directions(hidden_states).reshape(batch, count, -1), output

    def run(candidate: Array) -> Array:
        return _directions(step(candidate[:, None], cache).hidden_states[:batch, -1])  # [B, E]

    if watch is None:
        return jax.lax.map(run, tokens.T).swapaxes(0, 1), None
    directions = jnp.stack([run(candidate) for candidate in tokens.T], axis=1)
    watch.forget(count)
    return directions, None


def rank(
    strategy: ContrastiveSearch, context: Array, directions: Array, probabilities: Array
) -> Array:
    """The best [B] of K candidates (arXiv:2202.06417, equation 5).

    Args:
        context: [B, S, E] of unit length.
        directions: [B, K, E] of unit length.
        probabilities: [B, K].
    """
    likeness = (context @ directions.swapaxes(1, 2)).max(axis=1)  # [B, K]
    alpha = strategy.penalty_alpha
    return ((1 - alpha) * probabilities - alpha * likeness).argmax(-1)


def of_best(plan: DecodePlan, output: StepOutput, best: Array, watch: Watch | None) -> StepOutput:
    """The output of the best [B] of K candidates each, and a cache in which all K copies hold it."""
    count = plan.strategy.top_k
    total = len(best) * count
    rows = jnp.arange(len(best)) * count + best  # [B]
    if watch is not None:
        watch.select(lambda x: x[rows])
    last, copies = output.cache.used - 1, in_halves(plan, jnp.repeat(rows, count), total)

    def adopted(layer: LayerCache) -> LayerCache:
        key, value = (
            jax.lax.dynamic_slice_in_dim(x, last, 1, axis=2)[copies]
            for x in (layer.key, layer.value)
        )
        return layer.extended(key, value, last)

    cache = replace(output.cache, layers=tuple(adopted(layer) for layer in output.cache.layers))
    rows = in_halves(plan, rows, total)
    return StepOutput(output.logits[rows], None, cache)


def _of_tokens(plan: DecodePlan, state: DecodeState) -> KVCache:
    """The cache of one copy of each row, without the last token, as other strategies leave it."""
    cache = state.cache
    if not plan.strategy.low_memory:
        count = plan.strategy.top_k
        rows = jnp.arange(len(state.tokens)) * count
        cache = cache.take(in_halves(plan, rows, len(state.tokens) * count))
    return replace(cache, length=cache.length - 1)


def _directions(hidden_states: Array) -> Array:
    """[..., E] of unit length, in float32."""
    hidden_states = hidden_states.astype(jnp.float32)
    return hidden_states / jnp.linalg.norm(hidden_states, axis=-1, keepdims=True)
