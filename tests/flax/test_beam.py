# SPDX-License-Identifier: Apache-2.0
"""The loop of beam search with a step that is no model, against the one with lists."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from opt_core.generation.plan import DecodePlan
from opt_flax.cache import KVCache, LayerCache
from opt_flax.generation.beam import beam_search
from opt_flax.generation.state import Decoded, DecodeState, StepOutput
from tests.beams import (
    COMPILED_CASES,
    LIMIT,
    PROMPTS,
    TABLE,
    Array,
    Stopper,
    check,
    gumbel,
    plan_for,
)


def decode(plan: DecodePlan, noise: Array | None = None, watch: Any = None) -> Decoded:
    """Decodes the prompts with logits for each pair of tokens, of which the cache holds the first."""
    table, rows = jnp.asarray(TABLE), plan.strategy.rows
    prompts = jnp.repeat(jnp.asarray(PROMPTS, jnp.int32), rows, axis=0)  # [rows, 2]
    room = jnp.full((len(prompts), plan.max_new_tokens), plan.pad_token_id)
    tokens = jnp.concatenate([prompts, room], axis=1)

    def cache_of(tokens: jax.Array) -> KVCache:
        return KVCache((LayerCache(tokens, tokens),))

    def step(tokens: jax.Array, cache: KVCache) -> StepOutput:
        return StepOutput(table[cache.layers[0].key, tokens], None, cache_of(tokens))

    state = DecodeState(
        tokens=tokens,
        mask=jnp.ones_like(tokens),
        length=jnp.asarray(2, jnp.int32),
        prompt_length=2,
        offset=jnp.asarray(0, jnp.int32),
        limit=jnp.asarray(LIMIT, jnp.int32),
        finished=jnp.zeros(len(tokens), bool),
        logits=table[prompts[:, 0], prompts[:, 1]],
        cache=cache_of(prompts[:, 1:]),
    )
    draw = None if noise is None else jnp.asarray(noise).__getitem__
    if watch is not None:
        return beam_search(plan, state, step, draw, watch)
    return jax.jit(lambda state: beam_search(plan, state, step, draw, None))(state)


@pytest.mark.parametrize("case", COMPILED_CASES)
def test_finds_what_the_search_with_lists_finds(case: str) -> None:
    plan = plan_for(case)
    noise = gumbel(plan)
    check(plan, decode(plan, noise), noise)


def test_who_watches_sees_the_beams_and_ends_those_of_one_prompt() -> None:
    plan, watch = plan_for("groups at once"), Stopper(step=2)
    watch.check(plan, decode(plan, watch=watch))
