# SPDX-License-Identifier: Apache-2.0
"""Embeddings and heads that are exchanged or resized: arrays in a tree, and a module that fits it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_core import InputError
from opt_flax import FlaxOPTForCausalLM, FlaxOPTForSequenceClassification, FlaxOPTModel
from tests.cases import GOLDEN

TIED, UNTIED = (GOLDEN / "cases" / name for name in ("pre_norm", "untied_gelu"))
IDS = jnp.array([[5, 6, 7]])
each_head = pytest.mark.parametrize("folder", [TIED, UNTIED], ids=["tied", "untied"])


def load(folder, **options):
    return FlaxOPTForCausalLM.from_pretrained(folder, **options)


def test_a_tied_head_follows_its_embeddings():
    model = load(TIED)
    old, tree = model.get_input_embeddings(), model.params
    model.set_input_embeddings(np.asarray(2 * old, np.float64))
    table = model.get_output_embeddings()
    assert (table == 2 * old).all() and table.dtype == old.dtype
    hidden = FlaxOPTModel(model.config, _do_init=False)(IDS, params=model.params["model"])
    np.testing.assert_allclose(model(IDS).logits, hidden[0] @ table.T, atol=1e-5)
    assert tree["model"]["decoder"]["embed_tokens"]["embedding"] is old  # a caller's own tree
    with pytest.raises(InputError, match="tie_word_embeddings to False"):
        model.set_output_embeddings(table)


def test_a_head_can_be_untied_and_tied_again(tmp_path):
    model = load(TIED)
    before, table = model(IDS).logits, model.get_input_embeddings()
    model.config.tie_word_embeddings = False
    with pytest.raises(InputError, match="lm_head: expected .* found none"):
        model.get_output_embeddings()
    model.set_output_embeddings(2 * table)
    np.testing.assert_allclose(model(IDS).logits, 2 * before, rtol=1e-4)
    model.save_pretrained(tmp_path)
    np.testing.assert_array_equal(load(tmp_path)(IDS).logits, model(IDS).logits)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert (model.get_output_embeddings() == table).all() and [*model.params] == ["model"]
    np.testing.assert_array_equal(model(IDS).logits, before)


def test_other_heads_have_no_output_embeddings():
    with pytest.warns(UserWarning, match="score"):
        model = FlaxOPTForSequenceClassification.from_pretrained(TIED)
    assert model.get_output_embeddings() is None
    with pytest.raises(InputError, match="has no language modelling head"):
        model.set_output_embeddings(model.get_input_embeddings())


def test_a_tree_laid_out_for_decoding_stays_so():
    """A caller's own tree and configuration are left alone."""
    model, other = load(UNTIED).prepare_for_decoding(), load(UNTIED)
    size, config, tree = model.config.vocab_size, model.config, model.params
    expected = other.resize_token_embeddings(size + 5)
    assert (model.resize_token_embeddings(size + 5) == expected).all()
    assert model.params["lm_head"]["weight"].shape == expected.shape
    assert (model.get_output_embeddings() == other.get_output_embeddings()).all()
    new = jnp.array([[5, size + 4, size + 1]])
    np.testing.assert_allclose(model(new).logits, other(new).logits, atol=1e-5)
    assert config.vocab_size == size and tree["lm_head"]["weight"].shape[0] == size
    assert model.config.vocab_size == model.module.config.vocab_size == size + 5
    model.set_output_embeddings(2 * expected)
    assert (model.params["lm_head"]["weight"] == 2 * expected).all()


def test_seeds_draw_the_new_rows():
    def rows(seed):
        model = load(UNTIED)
        model.resize_token_embeddings(200, seed=seed)
        return model.get_input_embeddings()[-1], model.get_output_embeddings()[-1]

    assert (rows(1)[0] == rows(1)[0]).all() and (rows(1)[0] != rows(2)[0]).all()
    assert (rows(1)[0] != rows(1)[1]).all()


def test_nothing_is_asked_for():
    model = load(TIED)
    tree, module = model.params, model.module
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.params == tree and model.module is module
    assert model.resize_token_embeddings(pad_to_multiple_of=64).shape[0] == 128
    with pytest.raises(InputError, match="too few"):
        model.resize_token_embeddings(1)
    with pytest.raises(InputError, match=r"embed_tokens.*expected \(128, 24\).*found \(3, 24\)"):
        model.set_input_embeddings(jnp.ones((3, 24)))


@each_head
def test_parameters_apart_from_their_model(folder):
    model, params = load(folder, _do_init=False)
    size = model.config.vocab_size
    tree = model.resize_token_embeddings(size + 2, params=params, seed=3)
    held = load(folder)
    held.resize_token_embeddings(size + 2, seed=3)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, tree, held.params))
    assert model(IDS, params=tree).logits.shape[-1] == size + 2
    assert params["model"]["decoder"]["embed_tokens"]["embedding"].shape[0] == size
    with pytest.raises(InputError, match="embed_tokens: expected"):
        model.resize_token_embeddings(size, params=params)
    with pytest.raises(InputError, match="_do_init=False"):
        model.resize_token_embeddings(size)
    assert model.config.vocab_size == size + 2
    with pytest.raises(InputError, match="leave params= out"):
        held.resize_token_embeddings(size, params=params)


def test_a_number_format_is_kept():
    model = load(UNTIED, param_dtype="bfloat16")
    assert model.resize_token_embeddings(50).dtype == jnp.bfloat16
    assert model.get_output_embeddings().dtype == jnp.bfloat16


def test_a_head_of_its_own_is_not_ignored_once_the_configuration_changes():
    model = load(UNTIED)
    model.config.tie_word_embeddings = True
    for call in (model, model.generate):
        with pytest.raises(InputError, match="tie_weights"):
            call(IDS)
    model.tie_weights()
    model(IDS)


def test_a_head_that_would_be_ignored_is_refused(tmp_path):
    """Linen passes over parameters that a module does not have."""
    model = load(TIED)
    tree = {**model.params, "lm_head": {"kernel": model.get_input_embeddings().T}}
    for call in (
        lambda: model(IDS, params=tree),
        lambda: model.generate(IDS, params=tree),
        lambda: model.save_pretrained(tmp_path, params=tree),
        lambda: setattr(model, "params", tree),
    ):
        with pytest.raises(InputError, match="lm_head"):
            call()
