# SPDX-License-Identifier: Apache-2.0
"""The tree of parameters: names, shapes, initial values, models without one, dtypes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from flax.traverse_util import flatten_dict

from opt_core import InputError, OPTConfig
from opt_core.params import param_table
from opt_flax import FlaxOPTForCausalLM, FlaxOPTModel
from tests.cases import GOLDEN, case

TINY = OPTConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24
)
ROOT = Path(__file__).parents[2]
POST_NORM = GOLDEN / "cases" / "post_norm"


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def shapes(tree):
    return {path: leaf.shape for path, leaf in flatten_dict(tree).items()}


def test_the_tree_is_the_references():
    tree = FlaxOPTForCausalLM(TINY).params
    assert list(tree) == ["model"]  # a tied head is no parameter
    assert tree["model"]["decoder"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"].shape == (
        16,
        16,
    )
    assert tree["model"]["decoder"]["layers"]["1"]["fc1"]["kernel"].shape == (16, 24)
    assert set(FlaxOPTModel(TINY).params) == {"decoder"}
    untied = FlaxOPTForCausalLM(TINY.replace(tie_word_embeddings=False)).params
    assert untied["lm_head"]["kernel"].shape == (16, 50)


@pytest.mark.parametrize("size", ["opt-125m", "opt-350m", "opt-175b"])
@pytest.mark.parametrize("model_class", [FlaxOPTModel, FlaxOPTForCausalLM])
def test_initial_values_of_published_sizes_without_memory(size, model_class):
    """The module's own parameters, and those that `init_weights` draws from the table."""
    model = model_class(OPTConfig.preset(size), _do_init=False)
    key, ids = jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    drawn = shapes(jax.eval_shape(model.init_weights, key))
    assert drawn == shapes(jax.eval_shape(model.module.init, key, ids)["params"])
    table = param_table(model.config, model.architecture)
    assert drawn.keys() == {param.path("flax", model.architecture) for param in table}


#: Each kind of parameter in each of its ways; the others have but other activations.
OPTIONS = ("post_norm", "galactica", "no_affine", "untied_gelu")


@pytest.mark.parametrize("name", OPTIONS)
def test_init_weights_and_the_module_agree_for_every_option(name):
    model = FlaxOPTForCausalLM(case(name).config, _do_init=False)
    key, ids = jax.random.key(0), jnp.ones((1, 1), jnp.int32)
    drawn = flatten_dict(model.init_weights(key))
    own = flatten_dict(jax.jit(model.module.init)(key, ids)["params"])
    assert drawn.keys() == own.keys()
    for path, values in drawn.items():
        assert values.shape == own[path].shape
        assert float(values.std()) == pytest.approx(float(own[path].std()), rel=0.3), path
        assert ((values == 0).all(-1) == (own[path] == 0).all(-1)).all(), path  # the pad row


def test_seed_decides_the_initial_values():
    first, same, other = (FlaxOPTModel(TINY, seed=seed).params for seed in (5, 5, 6))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), first, same))
    assert not jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), first, other))


def test_without_init_there_are_no_parameters():
    model = FlaxOPTForCausalLM(TINY, _do_init=False)
    for use in (
        lambda: model.params,
        lambda: model([[5]]),
        lambda: model.generate([[5]], max_new_tokens=1),
    ):
        with pytest.raises(InputError, match="_do_init=False"):
            use()
    params = model.init_weights(jax.random.key(0), (1, 1))
    expected = model([[5, 6]], params=params).logits
    model.params = freeze(params)
    assert type(model.params["model"]["decoder"]) is dict
    np.testing.assert_array_equal(model([[5, 6]]).logits, expected)


def test_from_pretrained_without_init_returns_the_parameters(tmp_path):
    model, params = FlaxOPTForCausalLM.from_pretrained(POST_NORM, _do_init=False)
    with pytest.raises(InputError, match="params="):
        model.save_pretrained(tmp_path)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    model.save_pretrained(tmp_path, params=doubled)
    _, found, report = FlaxOPTForCausalLM.from_pretrained(
        tmp_path, _do_init=False, output_loading_info=True
    )
    assert not any(report.values())
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), found, doubled))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: {"model": tree}, r"decoder.*expected \(.*found none"),
        (lambda tree: {**tree, "lm_head": {"kernel": jnp.ones(3)}}, "expected no such parameter"),
        (
            lambda tree: jax.tree.map(lambda x: x[:-1], tree),
            r"embed_tokens/embedding: expected \(50, 16\), found \(49, 16\)",
        ),
    ],
)
def test_parameters_of_another_model_are_refused(change, message):
    model = FlaxOPTModel(TINY)
    before = model.params
    with pytest.raises(InputError, match=message):
        model.params = change(before)
    assert model.params is before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("param_dtype", [None, "float32"])
def test_the_compute_dtype_holds_in_every_layer(dtype, param_dtype):
    """opt-350m's projections had no dtype in the reference, so that all after them ran in float32."""
    model = FlaxOPTForCausalLM.from_pretrained(POST_NORM, dtype=dtype, param_dtype=param_dtype)
    assert model.config.word_embed_proj_dim != model.config.hidden_size
    assert dtypes(model.params) == {"float32"}  # the file's
    output = model([[5, 6, 7]], use_cache=True, output_hidden_states=True, output_attentions=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(output)} == {dtype}
    assert model.init_cache(1, 4)[0][0].dtype == dtype
    assert model.dtype == jnp.dtype(dtype)
    embeds = jnp.ones((1, 3, model.config.word_embed_proj_dim), jnp.float32)
    assert model(inputs_embeds=embeds).logits.dtype == dtype


def test_float64_only_where_jax_has_it():
    with pytest.raises(InputError, match="jax_enable_x64"):
        FlaxOPTModel(TINY, dtype="float64")


def test_float64_needs_the_exact_kernel():
    """A process of its own: the switch to 64 bits is global."""
    script = """
import jax
from opt_core import InputError, OPTConfig
from opt_flax import FlaxOPTForCausalLM
config = OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
model = FlaxOPTForCausalLM(config, dtype="float64", param_dtype="float64")
assert model([[5, 6]]).logits.dtype == "float64"
assert model.generate([[5, 6], [1, 7]], max_new_tokens=3).sequences.dtype == "int32"
try:
    FlaxOPTForCausalLM(config, dtype="float64", attn_implementation="sdpa")
except InputError as error:
    assert "use 'eager'" in str(error)
else:
    raise SystemExit("no error")
"""
    command = [sys.executable, "-W", "error", "-c", script]
    subprocess.run(command, check=True, env={**os.environ, "JAX_ENABLE_X64": "1"}, cwd=ROOT)


def test_loaded_parameters_may_be_donated():
    """JAX takes over the memory that numpy read; giving it away must not disturb a second model."""
    first = FlaxOPTForCausalLM.from_pretrained(POST_NORM)
    kept = [np.array(leaf) for leaf in jax.tree.leaves(first.params)]
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    changed = jax.tree.leaves(step(first.params))
    second = jax.tree.leaves(FlaxOPTForCausalLM.from_pretrained(POST_NORM).params)
    for new, fresh, old in zip(changed, second, kept, strict=True):
        np.testing.assert_array_equal(new, old + 1)
        np.testing.assert_array_equal(fresh, old)
