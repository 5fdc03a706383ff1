# SPDX-License-Identifier: Apache-2.0
"""Weights laid out for decoding: the same logits and tokens, and the way back to plain ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from opt_core import InputError, OPTConfig, UnsupportedError
from opt_flax import FlaxOPTForCausalLM
from opt_flax.parts import BLOCKS, FEW_ROWS, kernel_product, weight_product

#: opt-350m's shape in small: projections beside the layers' matrices; F is no multiple of BLOCKS.
CONFIG = OPTConfig(
    vocab_size=98,
    hidden_size=32,
    word_embed_proj_dim=16,
    ffn_dim=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    do_layer_norm_before=False,
)
IDS = np.array([[5, 6, 7, 8], [9, 8, 7, 6]])


@pytest.fixture
def model():
    return FlaxOPTForCausalLM(CONFIG, seed=3)


def leaves(params):
    return {path[-1] for path in flatten_dict(params)}


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [(3 * BLOCKS, 5), (7, 4 * BLOCKS)])
def test_products_are_those_of_numpy(rows, dtype, sizes):
    size, outputs = sizes
    x = jax.random.normal(jax.random.key(0), (rows, size), dtype)
    kernel = jax.random.normal(jax.random.key(1), (size, outputs), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    for found in (jax.jit(kernel_product)(x, kernel), jax.jit(weight_product)(x, kernel.T)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_products_have_the_gradients_of_plain_ones_under_vmap_too(rows):
    x, kernel = jnp.ones((3, rows, 4)), jnp.arange(24.0).reshape(4, 6)

    def gradients(product, matrix):
        def total(x, matrix):
            return (jax.vmap(product, (0, None))(x, matrix) ** 2).sum()

        return jax.grad(total, (0, 1))(x, matrix)

    expected = gradients(jnp.dot, kernel)
    found, transposed = gradients(kernel_product, kernel), gradients(weight_product, kernel.T)
    for ours, plain in zip((*found, transposed[0], transposed[1].T), expected * 2, strict=True):
        np.testing.assert_allclose(ours, plain)


def test_prepared_weights_give_the_same_logits_and_tokens(model):
    logits = model(IDS).logits
    tokens = model.generate(IDS, max_new_tokens=5).sequences
    assert model.prepare_for_decoding() is model
    assert "kernel" not in leaves(model.params)
    np.testing.assert_allclose(model(IDS).logits, logits, atol=1e-5)
    np.testing.assert_array_equal(model.generate(IDS, max_new_tokens=5).sequences, tokens)


def test_plain_weights_come_back_exactly(model):
    before = jax.tree.map(np.array, model.params)
    model.prepare_for_decoding().prepare_for_decoding()
    model.params = model.params
    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    assert all(isinstance(value, jax.Array) for value in jax.tree.leaves(model.params))


def test_prepared_weights_are_saved_as_plain_ones(model, tmp_path):
    before = jax.tree.map(np.array, model.params)
    model.prepare_for_decoding().save_pretrained(tmp_path)
    again = FlaxOPTForCausalLM.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, before)
    assert "weight" in leaves(model.params), "saving leaves them as they are"


def test_prepared_weights_have_the_gradients_of_plain_ones(model):
    def loss(params):
        return model(IDS, labels=IDS, params=params).loss

    expected = jax.jit(jax.grad(loss))(model.params)["model"]["decoder"]["layers"]["1"]["fc1"][
        "kernel"
    ]
    model.prepare_for_decoding()
    found = jax.jit(jax.grad(loss))(model.params)["model"]["decoder"]["layers"]["1"]["fc1"][
        "weight"
    ]
    np.testing.assert_allclose(found.T, expected, atol=1e-7)


def test_weights_elsewhere_than_on_one_cpu_stay_as_they_are(model):
    model._params = jax.tree.map(np.array, model.params)
    assert "kernel" in leaves(model.prepare_for_decoding().params)


def test_arguments_that_cannot_be(model):
    with pytest.raises(UnsupportedError, match="opt_torch"):
        model.prepare_for_decoding(weights="int8")
    with pytest.raises(InputError, match="expected None, found 'int3'"):
        model.prepare_for_decoding(weights="int3")
    with pytest.raises(InputError, match="expected at least 1, found 0"):
        model.prepare_for_decoding(batch_size=0)
    assert "kernel" in leaves(model.params)
    with pytest.raises(InputError, match="holds no parameters"):
        FlaxOPTForCausalLM(CONFIG, _do_init=False).prepare_for_decoding()
