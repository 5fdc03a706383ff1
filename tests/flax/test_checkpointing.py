# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing under JAX's transformations, and the memory that it frees."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opt_core import OPTConfig
from opt_flax import FlaxOPTForCausalLM

CONFIG = OPTConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=32,
    max_position_embeddings=64,
    dropout=0.2,
    attention_dropout=0.2,
    layerdrop=0.3,
)
ONE_LAYER = CONFIG.replace(num_hidden_layers=1, layerdrop=0.0)
STILL = CONFIG.replace(dropout=0.0, attention_dropout=0.0, layerdrop=0.0)
KEY = jax.random.key(3, impl="rbg")  # compiles faster
IDS = jax.random.randint(jax.random.key(1), (4, 6), 3, 40)


def pair(config: OPTConfig = CONFIG) -> tuple[Any, Any, Any]:
    """A model, its twin, which computes its layers again, and parameters for both."""
    plain, again = (FlaxOPTForCausalLM(config, _do_init=False) for _ in range(2))
    again.enable_gradient_checkpointing()
    return plain, again, jax.jit(plain.init_weights)(jax.random.key(0))


def loss_of(model: Any, **inputs: Any) -> Any:
    def loss(params: Any, ids: Any, key: Any) -> Any:
        options = {"params": params, "labels": ids, "dropout_rng": key, "train": True}
        return model(ids, **options, **inputs).loss

    return loss


def assert_alike(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_compiled_gradients_are_the_same():
    mask = jnp.ones_like(IDS).at[0, :3].set(0)
    heads = jnp.array([[1, 0.5], [0, 1]])
    *models, params = pair()
    losses = [loss_of(m, attention_mask=mask, head_mask=heads) for m in models]
    found = [jax.jit(jax.value_and_grad(loss))(params, IDS, KEY) for loss in losses]
    assert_alike(found[1], found[0])


def test_vmap_over_keys_and_rows():
    """Each key drops others, in the layers that are computed again too."""
    *models, params = pair(ONE_LAYER)
    keys = jax.random.split(KEY, 4)
    found = [
        jax.jit(jax.vmap(jax.grad(loss_of(m)), (None, 0, 0)))(params, IDS[:, None], keys)
        for m in models
    ]
    assert_alike(found[1], found[0])


def test_a_gradient_has_a_derivative():
    """Forward over reverse, as for the product of a Hessian and a vector."""
    _, again, params = pair(ONE_LAYER)
    gradient = partial(jax.grad(loss_of(again)), ids=IDS, key=KEY)
    found = jax.eval_shape(lambda p: jax.jvp(gradient, (p,), (p,))[1], params)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)


def test_memory_holds_the_inputs_of_layers_alone():
    """And without dropout no key is needed."""
    *models, params = pair(STILL.replace(num_hidden_layers=5, ffn_dim=256))
    ids, needed = jax.ShapeDtypeStruct((8, 64), jnp.int32), []
    for model in models:
        compiled = jax.jit(jax.grad(loss_of(model))).lower(params, ids, None).compile()
        needed.append(compiled.memory_analysis().temp_size_in_bytes)
    assert needed[1] < needed[0] / 2, needed


def test_names_of_parameters_and_configuration_stay():
    trees = []
    for model in pair()[:2]:
        draw = partial(model.module.init, deterministic=False)
        trees.append(jax.eval_shape(draw, {"params": KEY, "dropout": KEY}, IDS))
    assert trees[0] == trees[1]
    model = FlaxOPTForCausalLM(CONFIG, _do_init=False)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.config == CONFIG
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_a_cache_serves_in_training_but_none_comes_back():
    *models, params = pair(STILL.replace(num_hidden_layers=1))
    past = models[0](IDS[:, :3], params=params, use_cache=True).past_key_values
    run = lambda m: jax.jit(partial(m, train=True))(IDS[:, 3:], params=params, past_key_values=past)
    outputs = [run(m) for m in models]
    np.testing.assert_allclose(outputs[1].logits, outputs[0].logits, atol=1e-6)
    assert [*outputs[0]] == ["logits", "past_key_values"] and [*outputs[1]] == ["logits"]
