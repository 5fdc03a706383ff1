# SPDX-License-Identifier: Apache-2.0
"""The decoding loop with a step that is no model: what it feeds, where it stops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_core.generation.plan import DecodePlan, GenerationMode
from opt_flax.generation.decode import decode
from opt_flax.generation.generate import align_right
from opt_flax.generation.state import DecodeState

VOCABULARY, PAD = 16, 1


def next_token(token: jax.Array, steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Counts upwards from the token; the cache counts the steps."""
    return jax.nn.one_hot(token[:, 0] + 1, VOCABULARY), steps + 1


def run(first, count, eos=(), noise=None):
    """Decodes rows that start with the tokens `first`."""
    mode = GenerationMode.GREEDY if noise is None else GenerationMode.SAMPLE
    plan = DecodePlan(mode, (), 1, count, eos, PAD, 1)
    rows = len(first)
    tokens = jnp.full((rows, 1 + count), PAD).at[:, 0].set(jnp.array(first) - 1)
    state = DecodeState(
        tokens=tokens,
        mask=jnp.ones_like(tokens),
        length=jnp.asarray(1, jnp.int32),
        prompt_length=1,
        finished=jnp.zeros(rows, bool),
        logits=jax.nn.one_hot(jnp.array(first), VOCABULARY),
        cache=jnp.asarray(0),
    )
    found, length = decode(plan, state, next_token, noise)
    return found.tolist(), int(length)


def test_counts_upwards():
    assert run([3, 7], 4) == ([[3, 4, 5, 6], [7, 8, 9, 10]], 4)


def test_one_token_needs_no_step():
    assert run([3], 1) == ([[3]], 1)


def test_ended_rows_continue_with_pads_and_the_last_one_ends_the_loop():
    assert run([3, 6], 6, eos=(7,)) == ([[3, 4, 5, 6, 7, PAD], [6, 7, PAD, PAD, PAD, PAD]], 5)
    assert run([7, 7], 6, eos=(7,)) == ([[7] + [PAD] * 5] * 2, 1)


def test_any_of_several_ends():
    assert run([3, 9], 4, eos=(4, 10)) == ([[3, 4, PAD, PAD], [9, 10, PAD, PAD]], 2)


@pytest.mark.parametrize("count", [1, 5])
def test_steps_are_as_many_as_the_plans_capacity_allows(count):
    """The last token is never fed back: with a capacity of prompt + new - 1 no column is missing."""
    steps = []

    def counted(token, cache):
        jax.debug.callback(lambda: steps.append(1))
        return next_token(token, cache)

    plan = DecodePlan(GenerationMode.GREEDY, (), 1, count, (), PAD, 1)
    state = DecodeState(
        tokens=jnp.full((1, 1 + count), PAD),
        mask=jnp.ones((1, 1 + count), int),
        length=jnp.asarray(1, jnp.int32),
        prompt_length=1,
        finished=jnp.zeros(1, bool),
        logits=jax.nn.one_hot(jnp.array([3]), VOCABULARY),
        cache=jnp.asarray(0),
    )
    jax.block_until_ready(decode(plan, state, counted, None))
    jax.effects_barrier()
    assert len(steps) == count - 1 == plan.capacity - 1


def test_noise_decides_where_it_is_larger():
    noise = jnp.zeros((3, 1, VOCABULARY)).at[1, 0, 12].set(9.0)
    assert run([3], 3, noise=noise.__getitem__) == ([[3, 12, 13]], 3)


def test_rows_are_aligned_to_the_right_in_their_order():
    tokens = jnp.array([[5, 6, 1, 1], [1, 5, 1, 6], [5, 6, 7, 8]])
    mask = jnp.array([[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]])
    found, moved = align_right(tokens, mask)
    np.testing.assert_array_equal(found, [[1, 1, 5, 6], [1, 1, 5, 6], [5, 6, 7, 8]])
    np.testing.assert_array_equal(moved, [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
