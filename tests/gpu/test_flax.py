# SPDX-License-Identifier: Apache-2.0
"""JAX on a CUDA GPU: cuDNN's attention beside the plain operations (`make gpu`)."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from opt_core import OPTConfig
from opt_flax import FlaxOPTForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX sees no GPU"),
]
TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2}
IDS = np.random.default_rng(0).integers(4, 500, (4, 48))
MASKS = {
    "none": None,
    "left": np.arange(48) >= np.array([[20], [1], [0], [0]]),
    "right": np.arange(48) < np.array([[20], [47], [48], [48]]),
}
#: Left to `make gpu-full`: each is two programs to compile.
full = pytest.mark.full


def model(kernel, dtype, heads):
    config = OPTConfig(
        vocab_size=500,
        hidden_size=2 * heads,
        num_attention_heads=2,
        num_hidden_layers=3,
        ffn_dim=256,
        max_position_embeddings=400,
        init_std=0.1,
        dropout=0.0,
    )
    return FlaxOPTForCausalLM(config, seed=0, dtype=dtype, attn_implementation=kernel)


@pytest.mark.parametrize("where", ["none", "left", pytest.param("right", marks=full)])
@pytest.mark.parametrize("heads", [64, 80, pytest.param(128, marks=full)])
@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=full), "bfloat16"])
def test_logits_and_gradients(dtype, heads, where):
    mask = None if MASKS[where] is None else MASKS[where].astype(int)
    real = np.ones_like(IDS) if mask is None else mask
    follows = np.concatenate([real[:, :1] * 0, real[:, 1:] * real[:, :-1]], axis=1)
    labels = np.where(follows == 1, IDS, -100)

    def run(model):
        def loss(params):
            output = model(IDS, attention_mask=mask, labels=labels, params=params)
            return output.loss, output.logits

        gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(model.params)
        return np.float32(logits)[real == 1], [np.float32(x) for x in jax.tree.leaves(gradients)]

    expected, exact = run(model("eager", "float32", heads))
    found, gradients = run(model("cudnn", dtype, heads))
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() / np.abs(expected).max() < TOLERANCE[dtype]
    whole = np.linalg.norm([np.linalg.norm(x) for x in exact])
    for mine, other in zip(gradients, exact, strict=True):
        # That of a key's bias is nothing but rounding: all keys alike change no weight.
        limit = 4 * TOLERANCE[dtype] * (np.linalg.norm(other) + whole / 100)
        assert np.linalg.norm(mine - other) < limit


@pytest.mark.parametrize(
    "where", [pytest.param("none", marks=full), "left", pytest.param("right", marks=full)]
)
def test_generated_tokens(where):
    """Those of float32 for the most part: near ties are decided otherwise in 16 bits."""
    mask = None if MASKS[where] is None else MASKS[where].astype(int)
    options = {"attention_mask": mask, "max_new_tokens": 16, "min_new_tokens": 16}
    found, expected = (
        np.asarray(model(kernel, dtype, 64).generate(IDS, **options).sequences)[:, 48:]
        for kernel, dtype in (("cudnn", "float16"), ("eager", "float32"))
    )
    assert (found == expected)[:, :4].mean() > 0.9
