# SPDX-License-Identifier: Apache-2.0
"""cuDNN's attention without a GPU: it is asked for by name, and elsewhere refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from opt_core import InputError, UnsupportedError
from opt_flax import FlaxOPTForCausalLM, attention
from tests.cases import case

IDS = np.random.default_rng(0).integers(3, 90, (2, 7))
MASK = np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


def load(kernel, dtype="float32", **options):
    """Parameters and computation in `dtype`."""
    options |= {"dtype": dtype, "param_dtype": dtype, "attn_implementation": kernel}
    return FlaxOPTForCausalLM.from_pretrained(case("pre_norm").folder, **options)


@pytest.fixture
def asked(monkeypatch):
    """JAX's own attention in cuDNN's place, and who was asked for."""
    own, found = jax.nn.dot_product_attention, []

    def attend(*arguments, implementation, **options):
        found.append(implementation)
        return own(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    monkeypatch.setattr(attention, "CUDNN_BACKENDS", ("cpu",))
    return found


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_the_kernel_is_asked_for(asked, mask):
    ours, plain = load("cudnn", dtype="bfloat16"), load("eager", dtype="bfloat16")
    found, expected = (m(IDS, attention_mask=mask).logits for m in (ours, plain))
    real = MASK == 1 if mask is not None else MASK >= 0
    assert asked == ["cudnn"] * ours.config.num_hidden_layers
    np.testing.assert_allclose(
        np.float32(found[real]), np.float32(expected[real]), rtol=0.05, atol=0.05
    )


def test_dropout_and_weights_run_in_plain_operations(asked):
    ours = load("cudnn", dtype="bfloat16", attention_dropout=0.5)
    with pytest.warns(UserWarning, match="such calls run 'eager' instead"):
        ours(IDS, train=True, dropout_rng=jax.random.key(0))
    assert ours(IDS, output_attentions=True).attentions and not asked


def test_generated_tokens(asked):
    ours, plain = load("cudnn", dtype="bfloat16"), load("eager", dtype="bfloat16")
    options = {"attention_mask": MASK, "max_new_tokens": 4}
    found, expected = (m.generate(IDS, **options).sequences for m in (ours, plain))
    assert {*asked} == {"cudnn"} and found.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_it_cannot(dtype, monkeypatch):
    if dtype == "float32":
        monkeypatch.setattr(attention, "CUDNN_BACKENDS", ("cpu",))
    with pytest.raises(UnsupportedError, match=f"found cpu and {dtype}. Load the model with dtype"):
        load("cudnn", dtype=dtype)(IDS)


def test_an_unknown_kernel():
    with pytest.raises(InputError, match="expected one of .'eager', 'sdpa', 'cudnn'."):
        load("flash_attention_2")
