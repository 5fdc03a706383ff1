# SPDX-License-Identifier: Apache-2.0
"""Steps of training as JAX's users write them: donated, scanned, mapped, accumulated, in 16 bits."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opt_core import OPTConfig
from opt_flax import FlaxOPTForCausalLM

CONFIG = OPTConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    ffn_dim=32,
    max_position_embeddings=16,
)
KEY = jax.random.key(3, impl="rbg")  # compiles faster
IDS = jax.random.randint(jax.random.key(1), (4, 6), 3, 40)
LABELS = IDS.at[0, :4].set(-100).at[2, 1:].set(-100)  # 2, 5, 0 and 5 of them count
OPTIMIZER = optax.adamw(1e-2)
MODEL = FlaxOPTForCausalLM(CONFIG, _do_init=False)
STILL = FlaxOPTForCausalLM(CONFIG.replace(dropout=0.0), _do_init=False)
PARAMS = jax.tree.map(np.asarray, MODEL.init_weights(jax.random.key(0)))  # which none can donate


def loss_of(params, ids, labels=None, key=None, model=STILL):
    labels = ids if labels is None else labels
    return model(ids, labels=labels, params=params, dropout_rng=key, train=True).loss


def step(params, moments, ids, key):
    loss, gradients = jax.value_and_grad(loss_of)(params, ids, None, key, MODEL)
    updates, moments = OPTIMIZER.update(gradients, moments, params)
    return optax.apply_updates(params, updates), moments, loss


def close(found, expected, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-6, **tolerance}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def test_a_donated_step_is_traced_once_and_runs_on_the_device_alone():
    """Its buffers are consumed, none is copied from or to the host; and `lax.scan` does the same."""
    traces = []

    @partial(jax.jit, donate_argnums=(0, 1))
    def donated(params, moments, ids, key):
        traces.append(ids.shape)
        return step(params, moments, ids, key)

    keys = jax.random.split(KEY, 3)
    before = params, moments = jax.device_put((PARAMS, OPTIMIZER.init(PARAMS)))
    losses, given = [], [(IDS, key) for key in keys]
    with jax.transfer_guard("disallow"):
        for ids, key in given:
            params, moments, loss = donated(params, moments, ids, key)
            losses.append(loss)
    assert len(traces) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))

    def body(state, key):
        params, moments, loss = step(*state, IDS, key)
        return (params, moments), loss

    state = PARAMS, OPTIMIZER.init(PARAMS)
    (scanned, _), found = jax.jit(partial(jax.lax.scan, body))(state, keys)
    close(found, jnp.stack(losses))
    close(scanned, params, atol=1e-5)
    assert len({float(loss) for loss in losses}) == 3


def test_gradients_of_each_row_and_of_each_model():
    """Mapped over rows, as for private or weighted training, and over an ensemble's parameters."""
    of_rows = jax.jit(jax.vmap(jax.grad(loss_of), (None, 0)))(PARAMS, IDS[:, None])
    expected = jax.jit(jax.grad(loss_of))(PARAMS, IDS)
    close(jax.tree.map(lambda x: x.mean(0), of_rows), expected)

    other = jax.tree.map(lambda x: 1.5 * x, PARAMS)
    both = jax.tree.map(lambda *x: np.stack(x), PARAMS, other)
    of_models = jax.jit(jax.vmap(jax.grad(loss_of), (0, None)))(both, IDS)
    close(jax.tree.map(lambda x: x[0], of_models), expected)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """By scan and by optax; where parts have unequal numbers of labels, by weighing them."""
    gradient = jax.jit(jax.value_and_grad(loss_of))

    @jax.jit
    def accumulated(params, ids, labels):
        counts = (labels[:, :, 1:] != -100).sum((1, 2))

        def add(total, part):
            found = jax.value_and_grad(loss_of)(params, *part[:2])
            return jax.tree.map(lambda a, b: a + part[2] * b, total, found), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, (ids, labels, counts / counts.sum()))[0]

    parts = (2, 2, 6)
    for labels in (IDS, LABELS):
        found = accumulated(PARAMS, IDS.reshape(parts), labels.reshape(parts))
        close(found, gradient(PARAMS, IDS, labels))

    optimizer = optax.MultiSteps(optax.adamw(1e-2), 2)
    params, moments = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    for part in IDS.reshape(parts):
        _, gradients = gradient(params, part, part)
        updates, moments = update(gradients, moments, params)
        params = optax.apply_updates(params, updates)
    _, gradients = gradient(PARAMS, IDS, IDS)
    updates, _ = OPTIMIZER.update(gradients, OPTIMIZER.init(PARAMS), PARAMS)
    # Adam's first step is the gradient's sign, so that of those near zero is any.
    close(params, optax.apply_updates(PARAMS, updates), atol=1e-4)


@partial(jax.jit, static_argnums=2)
def trained(params, moments, model):
    def body(state, _):
        loss, gradients = jax.value_and_grad(loss_of)(state[0], IDS, model=model)
        updates, moments = OPTIMIZER.update(gradients, state[1], state[0])
        return (optax.apply_updates(state[0], updates), moments), (loss, gradients)

    return jax.lax.scan(body, (params, moments), length=12)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_training_in_16_bits_stays_near_that_in_32(dtype):
    """Parameters, gradients and the loss have 32 bits, what lies between has 16."""
    half = FlaxOPTForCausalLM(STILL.config, dtype=dtype, _do_init=False)
    losses = {}
    for model in (STILL, half):
        (params, _), (losses[model], gradients) = trained(PARAMS, OPTIMIZER.init(PARAMS), model)
        assert {x.dtype.name for x in jax.tree.leaves((params, gradients))} == {"float32"}
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))
    assert half(IDS, params=PARAMS).logits.dtype == dtype
    assert losses[half].dtype == jnp.float32 and losses[half][-1] < losses[half][0] - 0.5
    np.testing.assert_allclose(losses[half], losses[STILL], rtol=0.02)
    assert (losses[half] != losses[STILL]).any()


def test_no_labels_give_no_loss_to_differentiate():
    with pytest.raises(TypeError, match="None"):
        jax.eval_shape(jax.grad(lambda p: STILL(IDS, params=p, train=True).loss), PARAMS)
