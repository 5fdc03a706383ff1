# SPDX-License-Identifier: Apache-2.0
"""What reaches the attention kernel, and what comes out of rows that see nothing."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opt_flax.attention as attention
from opt_flax import FlaxOPTForCausalLM
from opt_flax.masks import attention_bias
from tests.backends.base import CPU_KERNELS
from tests.cases import GOLDEN

PRE_NORM = GOLDEN / "cases" / "pre_norm"


@pytest.fixture
def seen(monkeypatch):
    """What the fused kernel is called with: the bias' shape or None, and is_causal."""
    calls = []

    def spy(query, key, value, bias, is_causal, head_mask, dropout):
        calls.append((None if bias is None else bias.values.shape, is_causal))
        return attention.sdpa_attention(query, key, value, bias, is_causal, head_mask, dropout)

    kernel = replace(attention.KERNELS["sdpa"], function=spy)
    monkeypatch.setitem(attention.KERNELS, "sdpa", kernel)
    monkeypatch.setattr("opt_core.calls._told", {"sdpa"})
    return calls


@pytest.fixture(scope="module")
def fused():
    return FlaxOPTForCausalLM.from_pretrained(PRE_NORM, attn_implementation="sdpa")


def test_no_mask_stays_none(seen, fused):
    ids = jnp.array([[5, 6, 7], [8, 9, 10]])
    fused(ids)
    assert set(seen) == {(None, True)}
    seen.clear()
    past = fused(ids, use_cache=True).past_key_values
    seen.clear()
    fused(ids[:, :1], past_key_values=past)
    assert set(seen) == {(None, False)}
    seen.clear()
    fused(ids, past_key_values=past)
    assert set(seen) == {((1, 1, 3, 6), False)}
    seen.clear()
    fused(ids[:, :1], past_key_values=fused.init_cache(2, 8))
    assert set(seen) == {((1, 1, 1, 8), False)}


def test_attentions_and_head_mask_fall_back_to_eager(seen, fused, monkeypatch):
    monkeypatch.setattr("opt_core.calls._told", set())
    with pytest.warns(UserWarning, match="run 'eager' instead"):
        fused([[5, 6]], output_attentions=True)
    fused([[5, 6]], head_mask=np.ones((3, 4)))  # said once
    assert not seen


@pytest.mark.parametrize("kernel", CPU_KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_row_that_sees_nothing_stays_finite(kernel, dtype):
    """Scores of -1000 and a mask of the lowest number would sum to -inf in 16 bits; all weigh alike."""
    key = jax.random.key(0)
    query, keys, value = (30 * jax.random.normal(k, (1, 2, 3, 8)) for k in jax.random.split(key, 3))
    query, keys, value = (x.astype(dtype) for x in (query, -abs(keys), abs(value)))
    bias = attention_bias(jnp.zeros((1, 3), jnp.int32), 3, 3, 0, jnp.dtype(dtype))
    context, _ = attention.KERNELS[kernel].function(
        abs(query), keys, value, bias, False, None, None
    )
    assert context.dtype == dtype
    expected = jnp.broadcast_to(value.astype(jnp.float32).mean(2, keepdims=True), context.shape)
    np.testing.assert_allclose(
        context.astype(np.float32), expected, rtol=8 * float(jnp.finfo(dtype).eps)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_softmax_of_16_bits_is_computed_in_32(dtype):
    """Of 300 equal weights, 16 bits cannot hold the sum of the exponentials."""
    query = jnp.zeros((1, 1, 1, 4), dtype)
    keys = jnp.zeros((1, 1, 300, 4), dtype)
    _, weights = attention.eager_attention(query, keys, keys, None, False, None, None)
    assert weights.dtype == dtype
    np.testing.assert_array_equal(weights, jnp.full_like(weights, 1 / 300))
