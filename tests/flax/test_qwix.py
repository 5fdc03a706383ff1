# SPDX-License-Identifier: Apache-2.0
"""LoRA and rounded weights by qwix, which wraps the module and puts parameters beside or in place of ours.

It finds a parameter where it meets `jnp.dot`, by the path of the module that holds it, while the module's
own `__call__` runs. Generation called an inner module, a step of one row cut its matrices into blocks, and
gradient checkpointing ran each layer as if it stood alone and again later: adapters had no effect there,
and no error said so.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax.traverse_util import flatten_dict, unflatten_dict

from opt_core import InputError
from opt_core.assets import TINY_SUMS
from opt_core.assets.sums import encode_problems, problems
from opt_flax import FlaxOPTForCausalLM, OPTTokenizer
from tests.cases import case

pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed")  # qwix asks for it
GOLDEN = case("post_norm")  # with narrower embeddings, so that the projections are adapted too
RANK, SCALE = 3, 2.0
IDS = jax.random.randint(jax.random.key(1), (2, 6), 3, 99)


def load(folder=GOLDEN.folder):
    return FlaxOPTForCausalLM.from_pretrained(folder, param_dtype="float32")


def wrapped(rounded=None, path=r".*/(project_in|project_out|layers/.*)"):
    """A model with adapters that are not zero, and all its parameters, flat."""
    model = load()
    rule = qwix.LoraRule(module_path=path, rank=RANK, alpha=SCALE * RANK, weight_qtype=rounded)
    model.module = qwix.apply_lora_to_model(model.module, qwix.LoraProvider([rule]))
    drawn = jax.jit(model.module.init)(jax.random.key(0), IDS[:1, :1])["params"]
    values = flatten_dict(drawn) | flatten_dict(qwix.quantize_params(model.params, drawn))
    for index, (path, leaf) in enumerate(values.items()):
        if path[-1].endswith("_lora_b"):
            values[path] = 0.1 * jax.random.normal(jax.random.key(index), leaf.shape)
    return model, values


def merged(values):
    """Plain parameters that do the same."""
    tree = {}
    for (*module, leaf), x in values.items():
        if "_lora_" not in leaf:
            x = x if isinstance(x, jax.Array) else qwix.dequantize(x.array)
            factors = [values.get((*module, f"{leaf}_lora_{which}")) for which in "ab"]
            tree[*module, leaf] = x if factors[0] is None else x + SCALE * factors[0] @ factors[1]
    return unflatten_dict(tree)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(None, id="float32"),
        pytest.param("int8", id="int8", marks=pytest.mark.slow),
        pytest.param("nf4", id="nf4", marks=pytest.mark.slow),
    ],
)
def adapted(request):
    return wrapped(request.param)


def test_each_linear_layer_is_adapted(adapted):
    model, values = adapted
    count = sum(path[-1] == "kernel_lora_a" for path in values)
    assert count == 2 + 6 * model.config.num_hidden_layers
    rounded = [path for path, leaf in values.items() if not isinstance(leaf, jax.Array)]
    assert len(rounded) in (0, count)


def test_a_merged_model_gives_the_same(adapted, tmp_path):
    """Logits of a batch and of one token, after the disk too, and what is generated."""
    model, values = adapted
    params, plain = unflatten_dict(values), load()
    before = plain(IDS).logits
    plain.save_pretrained(tmp_path, params=merged(values))
    plain = load(tmp_path)
    found = model(IDS, params=params).logits
    assert jnp.abs(found - before).max() > 0.1
    np.testing.assert_allclose(found, plain(IDS).logits, atol=1e-4)
    one = IDS[:1, :1]
    np.testing.assert_allclose(model(one, params=params).logits, plain(one).logits, atol=1e-4)
    options = {"max_new_tokens": 6, "eos_token_id": None}
    expected = plain.generate(IDS[:1], **options).sequences
    assert (model.generate(IDS[:1], params=params, **options).sequences == expected).all()
    with pytest.raises(InputError, match="lora_a: expected no such parameter"):
        model.params = params


def test_gradients_of_adapters_with_and_without_checkpointing(adapted):
    model, values = adapted
    factors = {path: leaf for path, leaf in values.items() if "_lora_" in path[-1]}

    def loss(factors):
        params = unflatten_dict(values | factors)
        options = {"dropout_rng": jax.random.key(2), "train": True}
        return model(IDS, params=params, labels=IDS, **options).loss

    found = []
    for switch in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        switch()
        found.append(jax.jit(jax.value_and_grad(loss))(factors))
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-6)
    for path, gradient in found[1][1].items():
        assert gradient.any(), path
        np.testing.assert_allclose(found[0][1][path], gradient, atol=1e-6, err_msg=str(path))


def test_a_target_that_matches_nothing_leaves_no_adapters():
    _, values = wrapped(path="nothing")
    assert not any("_lora_" in path[-1] for path in values)


def test_eight_bits_solve_what_32_do():
    """Weights alone are rounded; sums of the embedded model stay right, and its logits near."""
    model = load(TINY_SUMS)
    data = encode_problems(OPTTokenizer.from_pretrained(TINY_SUMS), problems("test"))
    ids, asked = data.input_ids[:128], data.labels[:128, 1:] != -100
    run = jax.jit(lambda params: model(ids, params=params).logits[:, :-1])
    exact = run(model.params)
    rule = qwix.QuantizationRule(module_path=".*/layers/.*", weight_qtype="int8")
    model.module = qwix.quantize_model(model.module, qwix.PtqProvider([rule]))
    shapes = jax.eval_shape(partial(model.module.init, jax.random.key(0)), ids)["params"]
    params = qwix.quantize_params(model.params, shapes)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (model.params, params)]
    rounded = jax.jit(lambda params: model(ids, params=params).logits[:, :-1])(params)
    assert sizes[1] < 0.5 * sizes[0]
    assert (rounded.argmax(-1) == exact.argmax(-1))[asked].mean() > 0.99
    error = jnp.sqrt(jnp.square(rounded - exact).mean() / jnp.square(exact).mean())
    assert 1e-4 < error < 0.03
