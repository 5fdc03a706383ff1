# SPDX-License-Identifier: Apache-2.0
"""Data parallelism by sharding: the batch over devices, the parameters on each, the step as it was.

The loss is the mean over all labels of the batch, so shards with unequal numbers of labels need no care,
unless a mean is taken on each device by hand (`shard_map`): then the parts are weighed by their labels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STEPS = """
import jax, jax.numpy as jnp, numpy as np, optax
from functools import partial
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from opt_core import OPTConfig
from opt_flax import FlaxOPTForCausalLM

config = OPTConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32,
    max_position_embeddings=16, dropout=0.1, layerdrop=0.3,
)
model = FlaxOPTForCausalLM(config, _do_init=False)
optimizer = optax.sgd(0.1, momentum=0.9)
ids = np.random.default_rng(0).integers(3, 40, (8, 6))
labels = ids.copy()
labels[:5, 2:] = -100
labels[7] = -100


def loss_of(params, ids, labels, key):
    return model(ids, labels=labels, params=params, dropout_rng=key, train=True).loss


@partial(jax.jit, donate_argnums=(0, 1))
def step(params, moments, ids, labels, key):
    loss, gradients = jax.value_and_grad(loss_of)(params, ids, labels, key)
    updates, moments = optimizer.update(gradients, moments, params)
    return optax.apply_updates(params, updates), moments, loss, gradients


def trained(mesh):
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    params = jax.jit(model.init_weights, out_shardings=everywhere)(jax.random.key(0))
    moments = jax.jit(optimizer.init, out_shardings=everywhere)(params)
    batch, found = jax.device_put((ids, labels), rows), []
    for index in range(3):
        params, moments, loss, gradients = step(params, moments, *batch, jax.random.key(index))
        found.append((loss, gradients))
    assert all(x.sharding.is_equivalent_to(everywhere, x.ndim) for x in jax.tree.leaves(params))
    return jax.tree.map(np.asarray, (params, found))


def close(found, expected):
    def check(path, a, b):
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3)
        assert error <= 1e-6, (jax.tree_util.keystr(path), error)
    jax.tree_util.tree_map_with_path(check, found, expected)


def by_hand(params, ids, labels):
    count = (labels[:, 1:] != -100).sum()
    loss, gradients = jax.value_and_grad(
        lambda p: jnp.where(count > 0, model(ids, labels=labels, params=p).loss, 0)
    )(params)
    share = count / jax.lax.psum(count, "data")
    return jax.tree.map(
        lambda x: jax.lax.psum(jnp.where(count > 0, share * x, 0), "data"), (loss, gradients)
    )


devices = jax.devices()
assert len(devices) == 8
alone = trained(Mesh(devices[:1], ("data",)))
for count in (2, 4, 8):
    close(trained(Mesh(devices[:count], ("data",))), alone)

mesh = Mesh(devices[:4], ("data",))
apart = {"mesh": mesh, "in_specs": (P(), P("data"), P("data")), "out_specs": P(), "check_vma": False}
params = jax.jit(model.init_weights)(jax.random.key(0))
found = jax.jit(jax.shard_map(by_hand, **apart))(params, ids, labels)
expected = jax.jit(jax.value_and_grad(lambda p: model(ids, labels=labels, params=p).loss))
close(found, expected(params))
"""


def test_two_four_and_eight_devices_train_as_one_does():
    """In a process with eight devices: losses, gradients and parameters of three steps, with dropout."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", STEPS]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
