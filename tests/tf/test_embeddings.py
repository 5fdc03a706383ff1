# SPDX-License-Identifier: Apache-2.0
"""Embeddings and heads that are exchanged or resized in a built Keras model, which Keras locks."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from opt_core import InputError, UnsupportedError
from opt_tf import TFOPTForCausalLM, TFOPTForQuestionAnswering
from opt_tf._keras import replace_layer
from tests.cases import GOLDEN

TIED, UNTIED = (GOLDEN / "cases" / name for name in ("pre_norm", "untied_gelu"))
IDS = np.array([[5, 6, 7, 8]], np.int32)
NEW = np.array([[120, 6, 125, 8]], np.int32)
both = pytest.mark.parametrize("folder", [TIED, UNTIED], ids=["tied", "untied"])
#: Keras 3.15 turns its variables into arrays in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept")


def fitted(folder, **options):
    model = TFOPTForCausalLM.from_pretrained(folder, **options)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), run_eagerly=True)
    model.fit({"input_ids": IDS, "labels": IDS}, verbose=0)
    return model


@both
def test_a_resized_model_is_compiled_again(folder):
    """Its optimizer and its functions know the variables that were there before."""
    model = fitted(folder)
    places = [variable.path for variable in model.weights]
    table = model.resize_token_embeddings(128)
    assert table is model.get_input_embeddings()
    assert [variable.path for variable in model.weights] == places
    with pytest.raises(ValueError, match=r"You must call `compile\(\)`"):
        model.fit({"input_ids": NEW, "labels": NEW}, verbose=0)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), run_eagerly=True)
    before = model.get_output_embeddings().weights[0].numpy()
    losses = model.fit({"input_ids": NEW, "labels": NEW}, epochs=4, verbose=0).history["loss"]
    after = model.get_output_embeddings().weights[0].numpy()
    assert losses[-1] < losses[0] - 0.1
    assert (before != after).any(axis=0 if folder == UNTIED else 1)[125]


@both
def test_a_resized_model_is_saved_by_keras(tmp_path, folder):
    model = fitted(folder)
    model.resize_token_embeddings(128)
    expected = model(NEW).logits
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert np.array_equal(loaded(NEW).logits, expected)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = TFOPTForCausalLM.from_config(model.get_config())
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert np.array_equal(fresh(NEW).logits, expected)
    again = TFOPTForCausalLM.from_config(model.get_config())
    again.set_weights(model.get_weights())  # the order of the variables is the same too
    assert np.array_equal(again(NEW).logits, expected)


def test_frozen_rows_stay_frozen_and_keep_their_kind():
    model = TFOPTForCausalLM.from_pretrained(UNTIED, dtype="bfloat16")
    model.get_input_embeddings().trainable = False
    table = model.resize_token_embeddings(50)
    assert (table.variable_dtype, table.trainable, table.input_dim) == ("bfloat16", False, 50)
    assert table.trainable_weights == []
    assert model.get_output_embeddings().units == 50


def test_quantized_rows_are_not_resized():
    model = TFOPTForCausalLM.from_pretrained(UNTIED).prepare_for_decoding(weights="int8")
    with pytest.raises(UnsupportedError, match="lm_head has int8 weights"):
        model.resize_token_embeddings(128)
    lora = TFOPTForCausalLM.from_pretrained(TIED)
    lora.get_input_embeddings().enable_lora(2)
    with pytest.raises(UnsupportedError, match="embed_tokens has LoRA weights"):
        lora.resize_token_embeddings(128)
    for each in (model, lora):
        assert each.config.vocab_size == each.get_input_embeddings().input_dim
        assert each(IDS).logits.shape[-1] == each.config.vocab_size


def test_a_tied_head_follows_its_embeddings():
    model = TFOPTForCausalLM.from_pretrained(TIED)
    model.predict(IDS, verbose=0)
    table = keras.layers.Embedding(103, 24)
    table.build()
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table is model.get_output_embeddings()
    states = model.model(IDS).last_hidden_state.numpy()
    expected = states @ table.embeddings.numpy().T
    np.testing.assert_allclose(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.predict(IDS, verbose=0).logits, expected, rtol=1e-5, atol=1e-6)
    assert table.embeddings in model.trainable_variables
    with pytest.raises(InputError, match="tie_word_embeddings to False"):
        model.set_output_embeddings(keras.layers.Dense(103, use_bias=False))


def test_a_head_is_untied_and_tied_again(tmp_path):
    model = TFOPTForCausalLM.from_pretrained(TIED)
    tied, count = model(IDS).logits, len(model.weights)
    model.config.tie_word_embeddings = False
    with pytest.raises(InputError, match="give the model a head by set_output_embeddings"):
        model.save_pretrained(tmp_path)
    head = keras.layers.Dense(103, use_bias=False)
    head.build((None, 24))
    model.set_output_embeddings(head)
    assert len(model.weights) == count + 1
    expected = model(IDS).logits
    states = model.model(IDS).last_hidden_state.numpy()
    np.testing.assert_allclose(expected, states @ head.kernel.numpy(), rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = TFOPTForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(again(IDS).logits, expected, rtol=1e-6, atol=1e-7)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.get_output_embeddings() is model.get_input_embeddings()
    assert len(model.weights) == count
    assert np.array_equal(model(IDS).logits, tied)


def test_other_heads_have_no_output_embeddings():
    with pytest.warns(UserWarning, match="qa_outputs"):
        model = TFOPTForQuestionAnswering.from_pretrained(TIED)
    assert model.get_output_embeddings() is None
    model.tie_weights()
    with pytest.raises(InputError, match="has no language modelling head"):
        model.set_output_embeddings(keras.layers.Dense(103))


def test_another_keras_says_so():
    """The one private part of Keras that is used may be gone in a later version."""

    class Layer:
        place = None

    with pytest.raises(UnsupportedError, match=r"lets no layer of a built model be replaced"):
        replace_layer(Layer(), "place", Layer())


def test_a_head_untied_by_hand_is_saved(tmp_path):
    """No head was written, and the next loading took the embedding for it."""
    model = TFOPTForCausalLM.from_pretrained(TIED)
    replace_layer(model, "lm_head", keras.layers.Dense(103, use_bias=False, name="lm_head"))
    expected = model(IDS).logits
    assert model.num_parameters() == model.count_params()
    model.save_pretrained(tmp_path)
    again = TFOPTForCausalLM.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings is False
    assert np.array_equal(again(IDS).logits, expected)
    assert model.get_config()["config"]["tie_word_embeddings"] is False  # in a file of Keras, too


def test_what_a_checkpoint_has_no_place_for_is_refused_by_name(tmp_path):
    """It was left out without a word."""
    model = TFOPTForCausalLM.from_pretrained(TIED)
    replace_layer(model, "lm_head", keras.layers.Dense(103, name="lm_head"))  # with a bias
    model(IDS)
    with pytest.raises(UnsupportedError, match=r"lm_head/bias.*model\.save"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
