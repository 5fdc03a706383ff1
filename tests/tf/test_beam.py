# SPDX-License-Identifier: Apache-2.0
"""The loop of beam search with a step that is no model, against the one with lists."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import tensorflow as tf

from opt_core.generation.plan import DecodePlan
from opt_tf.cache import KVCache, LayerCache
from opt_tf.generation.beam import beam_search
from opt_tf.generation.state import Decoded, DecodeState, StepOutput
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
    table, rows = tf.constant(TABLE), plan.strategy.rows
    prompts = tf.repeat(tf.constant(PROMPTS, tf.int32), rows, axis=0)  # [rows, 2]
    room = tf.fill((prompts.shape[0], plan.max_new_tokens), plan.pad_token_id)
    tokens = tf.concat([prompts, room], axis=1)

    def cache_of(tokens: tf.Tensor) -> KVCache:
        return KVCache((LayerCache(tokens, tokens),))

    def step(tokens: tf.Tensor, cache: KVCache) -> StepOutput:
        pairs = tf.stack([cache.layers[0].key, tokens], axis=-1)  # [rows, 1, 2]
        return StepOutput(tf.gather_nd(table, pairs), None, cache_of(tokens))

    def run() -> Decoded:
        state = DecodeState(
            tokens=tokens,
            mask=tf.ones_like(tokens),
            length=tf.constant(2),
            prompt_length=tf.constant(2),
            offset=tf.constant(0),
            limit=tf.constant(LIMIT),
            finished=tf.zeros(tokens.shape[0], tf.bool),
            logits=tf.gather_nd(table, prompts),
            cache=cache_of(prompts[:, 1:]),
        )
        draw = None if noise is None else partial(tf.gather, tf.constant(noise))
        return beam_search(plan, state, step, draw, watch)

    return run() if watch is not None else tf.function(run, jit_compile=True)()


@pytest.mark.parametrize("case", COMPILED_CASES)
def test_finds_what_the_search_with_lists_finds(case: str) -> None:
    plan = plan_for(case)
    noise = gumbel(plan)
    check(plan, decode(plan, noise), noise)


def test_who_watches_sees_the_beams_and_ends_those_of_one_prompt() -> None:
    plan, watch = plan_for("groups at once"), Stopper(step=2)
    watch.check(plan, decode(plan, watch=watch))
