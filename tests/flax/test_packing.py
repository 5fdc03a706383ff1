# SPDX-License-Identifier: Apache-2.0
"""Packed rows where no values can be read: under jit, grad and vmap."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_flax import FlaxOPTForCausalLM
from tests.backends.base import CPU_KERNELS
from tests.cases import case

GOLDEN = case("pre_norm")
#: Two texts and pads on either side of each, one of them between the two.
POSITIONS = jnp.array([[-1, 0, 1, 2, -1, 0, 1, -1], [0, 1, 2, 3, 0, 1, 2, 3]])
IDS = jnp.where(POSITIONS < 0, 1, jax.random.randint(jax.random.key(0), (2, 8), 3, 103))
MASK = (POSITIONS >= 0).astype(int)
LABELS = jnp.where(POSITIONS < 1, -100, IDS)
TEXTS = [(0, slice(1, 4)), (0, slice(5, 7)), (1, slice(0, 4)), (1, slice(4, 8))]


@pytest.fixture(scope="module", params=CPU_KERNELS)
def model(request):
    return FlaxOPTForCausalLM.from_pretrained(GOLDEN.folder, attn_implementation=request.param)


def test_values_that_are_traced(model):
    """Logits and gradients of one program, for rows of several texts and of one."""

    @jax.jit
    def step(params, positions):
        def loss(params):
            options = {"position_ids": positions, "labels": LABELS, "params": params}
            output = model(IDS, MASK, **options)
            return output.loss, output.logits

        return jax.grad(loss, has_aux=True)(params)

    gradient, found = step(model.params, POSITIONS)
    lengths = jnp.array([columns.stop - columns.start for _, columns in TEXTS])
    rows = jnp.ones((4, 4), int)
    for index, (row, columns) in enumerate(TEXTS):
        rows = rows.at[index, : lengths[index]].set(IDS[row, columns])
    mask = (jnp.arange(4) < lengths[:, None]).astype(int)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def apart(params):
        labels = jnp.where(mask == 1, rows, -100)
        output = model(rows, mask, labels=labels, params=params)
        return output.loss, output.logits

    expected, alone = apart(model.params)
    for index, (row, columns) in enumerate(TEXTS):
        np.testing.assert_allclose(
            found[row, columns], alone[index, : lengths[index]], atol=1e-5, err_msg=str(columns)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, expected)
    counted = jnp.where(MASK == 1, MASK.cumsum(axis=1) - 1, -1)
    _, found = step(model.params, counted)
    expected = model(IDS, MASK).logits
    np.testing.assert_allclose(found[MASK == 1], expected[MASK == 1], atol=1e-5)


def test_vmap_over_rows(model):
    expected = model(IDS, MASK, position_ids=POSITIONS).logits
    one = jax.vmap(lambda i, m, p: model(i[None], m[None], position_ids=p[None]).logits[0])
    real = MASK == 1
    np.testing.assert_allclose(jax.jit(one)(IDS, MASK, POSITIONS)[real], expected[real], atol=1e-5)
