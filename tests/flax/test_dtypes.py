# SPDX-License-Identifier: Apache-2.0
"""`dtype` is the computation's, `param_dtype` the parameters', which keep the file's without it."""

from __future__ import annotations

import json
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax.core import freeze

from opt_core import InputError
from opt_core.checkpoints import CheckpointReader
from opt_flax import FlaxOPTForCausalLM, FlaxOPTForSequenceClassification, FlaxOPTModel
from tests.cases import case

FILE = case("pre_norm").folder  # in float32
IDS = np.arange(3, 13).reshape(2, 5)
KEPT = "are kept in float16, in which a training loses small updates"


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


@pytest.fixture(scope="module")
def wide():
    return FlaxOPTForCausalLM.from_pretrained(FILE)


@pytest.fixture(scope="module")
def narrow(wide, tmp_path_factory):
    """A checkpoint in float16, as Meta's are."""
    folder = tmp_path_factory.mktemp("float16")
    wide.save_pretrained(folder, params=wide.to_fp16(wide.params))
    return folder


@pytest.fixture(scope="module")
def mixed(wide, tmp_path_factory):
    """A checkpoint of which the norms alone are in float32."""
    folder = tmp_path_factory.mktemp("mixed")
    mask = jax.tree.map_with_path(lambda path, _: "norm" not in str(path), wide.params)
    wide.save_pretrained(folder, params=wide.to_fp16(wide.params, mask))
    return folder


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("cls", [FlaxOPTForCausalLM, FlaxOPTModel])
def test_the_dtype_of_the_computation_rounds_no_parameter(cls, dtype, key, wide, tmp_path):
    """A fine-tuning in bfloat16 lost its small updates, and saved bfloat16."""
    model = cls.from_pretrained(FILE, **{key: dtype})
    assert model.dtype == dtype and dtypes(model.params) == {"float32"}
    assert dtypes(model(IDS)[0]) == {np.dtype(dtype).name}
    assert model.config.torch_dtype == "float32"
    found = model.params["model"] if cls is FlaxOPTForCausalLM else model.params
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, wide.params["model"]))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    assert dtypes(cls.from_pretrained(tmp_path).params) == {"float32"}


def test_small_updates_are_not_lost():
    model = FlaxOPTForCausalLM.from_pretrained(FILE, dtype=jnp.bfloat16)
    optimizer = optax.sgd(1e-5)

    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda x: model(IDS, labels=IDS, params=x).loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, gradients

    params, _, gradients = step(model.params, optimizer.init(model.params))
    moved = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), params, model.params)
    expected = jax.tree.map(lambda x: 1e-5 * jnp.abs(x).max(), gradients)
    table = moved["model"]["decoder"]["embed_tokens"]["embedding"]
    assert 0 < table < 1e-4  # far below what bfloat16 can tell apart
    assert dtypes(params) == dtypes(gradients) == {"float32"}
    np.testing.assert_allclose(
        table, expected["model"]["decoder"]["embed_tokens"]["embedding"], rtol=0.1
    )


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"torch_dtype": jnp.bfloat16}])
def test_16_bits_of_the_file_are_kept_and_said(narrow, options):
    with pytest.warns(UserWarning, match=KEPT) as said:
        model = FlaxOPTForCausalLM.from_pretrained(narrow, **options)
    assert len(said) == 1 and said[0].filename == __file__
    assert 'Pass param_dtype="float32" to train' in str(said[0].message)
    assert dtypes(model.params) == {"float16"} and model.config.torch_dtype == "float16"
    assert model.dtype == (jnp.bfloat16 if options else jnp.float32)
    with pytest.warns(UserWarning, match=KEPT):
        _, params = FlaxOPTForCausalLM.from_pretrained(narrow, _do_init=False, **options)
    assert dtypes(params) == {"float16"}


@pytest.mark.parametrize(
    ("options", "held", "computed"),
    [
        ({"param_dtype": "float32"}, "float32", "float32"),
        ({"param_dtype": jnp.float16}, "float16", "float32"),
        ({"param_dtype": "auto"}, "float16", "float32"),
        ({"param_dtype": "bf16", "dtype": "float32"}, "bfloat16", "float32"),
        ({"param_dtype": "float32", "dtype": "bfloat16"}, "float32", "bfloat16"),
        ({"dtype": "float16"}, "float16", "float16"),
        ({"dtype": "auto"}, "float16", "float16"),
        ({"dtype": "float32"}, "float32", "float32"),  # wider, and named
    ],
)
def test_who_names_a_dtype_is_not_warned(narrow, options, held, computed):
    with warnings.catch_warnings(record=True, action="always") as said:
        model = FlaxOPTForCausalLM.from_pretrained(narrow, **options)
    assert not said
    assert dtypes(model.params) == {held} and model.dtype == computed
    assert model.config.torch_dtype == held


def test_a_file_in_float32_needs_no_warning():
    with warnings.catch_warnings(record=True, action="always") as said:
        FlaxOPTForCausalLM.from_pretrained(FILE)
        FlaxOPTForCausalLM.from_pretrained(FILE, dtype="float16")
    assert not said


def test_16_bits_hold_the_same_numbers(narrow):
    """Widened at loading or in the computation."""
    kept = FlaxOPTForCausalLM.from_pretrained(narrow, param_dtype="float16")
    widened = FlaxOPTForCausalLM.from_pretrained(narrow, param_dtype="float32")
    np.testing.assert_allclose(kept(IDS).logits, widened(IDS).logits, rtol=0, atol=1e-5)
    options = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 1}
    assert jnp.array_equal(
        kept.generate(IDS, **options).sequences, widened.generate(IDS, **options).sequences
    )
    kept.prepare_for_decoding()
    assert jnp.array_equal(
        kept.generate(IDS, **options).sequences, widened.generate(IDS, **options).sequences
    )


def test_each_tensor_keeps_its_own(mixed, tmp_path):
    with pytest.warns(UserWarning, match=KEPT):
        model = FlaxOPTForCausalLM.from_pretrained(mixed)
    layer = model.params["model"]["decoder"]["layers"]["0"]
    assert dtypes(layer["self_attn_layer_norm"]) == {"float32"}
    assert dtypes(layer["self_attn"]) == {"float16"}
    model.save_pretrained(tmp_path)
    with CheckpointReader.open(mixed) as before, CheckpointReader.open(tmp_path) as after:
        assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float16"


def test_a_new_head_is_trained_in_32_bits(narrow):
    with pytest.warns(UserWarning, match="initialised anew"), pytest.warns(match=KEPT):
        model = FlaxOPTForSequenceClassification.from_pretrained(narrow)
    assert dtypes(model.params["score"]) == {"float32"}
    assert dtypes(model.params["model"]) == {"float16"}


def test_an_unknown_dtype():
    with pytest.raises(InputError, match="Unknown dtype 'int8'"):
        FlaxOPTForCausalLM.from_pretrained(FILE, param_dtype="int8")


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_casts_return_another_tree(wide, name):
    model = FlaxOPTForCausalLM(wide.config, _do_init=False)
    to = {"bfloat16": model.to_bf16, "float16": model.to_fp16, "float32": model.to_fp32}[name]
    tree = {**wide.params, "steps": jnp.arange(3)}
    for given in (tree, freeze(tree), wide.to_bf16(tree)):
        found = to(given)
        assert dtypes(found) == {name, "int32"} and type(found) is dict
        assert found["steps"].tolist() == [0, 1, 2]
    assert dtypes(wide.params) == {"float32"}
    mask = jax.tree.map_with_path(lambda path, _: "embed" in str(path[2]), wide.params)
    for given in (mask, freeze(mask)):
        decoder = to(wide.params, given)["model"]["decoder"]
        assert decoder["embed_tokens"]["embedding"].dtype == name
        assert dtypes(decoder["layers"]) == {"float32"}
    with pytest.raises(InputError, match="mask: expected a tree of the structure of params"):
        to(wide.params, {"model": True})
