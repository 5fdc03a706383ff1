# SPDX-License-Identifier: Apache-2.0
"""What Keras does with any model: fit, predict, mixed precision, save, adapters."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_core import OPTConfig
from opt_tf import KVCache, TFOPTForCausalLM
from opt_tf.outputs import CausalLMOutput
from tests.cases import case
from tests.tf.tiny import TASK, tiny
from tests.tolerances import assert_close

#: Keras 3.15 turns its variables into arrays in a way that numpy 2 warns of.
keras_on_numpy_2 = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept")


@pytest.fixture
def policy():
    """Sets Keras' global dtype policy, for one test."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


def adam():
    return keras.optimizers.Adam(1e-2)


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}, {"run_eagerly": True}])
def test_fit_without_a_loss_of_its_own(options):
    """On a CPU, Keras takes by itself a graph without XLA."""
    model = tiny()
    model.compile(optimizer=keras.optimizers.Adam(0.03), **options)
    losses = model.fit(TASK, batch_size=12, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert model.evaluate(TASK, batch_size=12, verbose=0) < losses[-1] + 0.5


def test_fit_starts_from_the_model_s_loss(model, inputs, golden):
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    loss = golden.outputs("left")["loss"]
    assert model.evaluate(inputs, verbose=0) == pytest.approx(float(loss), rel=1e-5)


def test_labels_as_the_target(model, inputs, golden):
    inputs = dict(inputs)
    target = inputs.pop("labels")
    model.compile(optimizer=adam())
    data = tf.data.Dataset.from_tensors((inputs, target))
    loss = golden.outputs("left")["loss"]
    assert model.evaluate(data, verbose=0) == pytest.approx(float(loss), rel=1e-5)


def test_another_loss_sees_target_and_logits(model, inputs, golden):
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    shifted = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], -100)], axis=1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)
    model.compile(optimizer=adam(), loss=loss)
    data = tf.data.Dataset.from_tensors((inputs, shifted))
    expected = float(golden.outputs("left")["loss"])
    assert model.evaluate(data, verbose=0) == pytest.approx(expected, rel=1e-5)


def test_predict_joins_batches(model, inputs, logits, real):
    found = model.predict(dict(inputs), batch_size=2, verbose=0)
    assert isinstance(found, CausalLMOutput)
    assert isinstance(found.past_key_values, KVCache)
    assert found.past_key_values[0][0].shape == (3, 4, 7, 6)
    assert_close(found.logits[real], logits[real], "logits")


@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy, golden, inputs, name):
    policy(name)
    model = TFOPTForCausalLM.from_pretrained(golden.folder)
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    output = model(inputs)
    assert output.logits.dtype == name.removeprefix("mixed_")
    assert output.loss.dtype == "float32"
    assert float(output.loss) == pytest.approx(float(golden.outputs("left")["loss"]), rel=0.02)
    model.compile(optimizer=adam(), run_eagerly=True)  # test_fit.py has graphs
    losses = model.fit(inputs, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert model.generate(inputs["input_ids"], max_new_tokens=2).shape == (3, 9)


def test_a_dtype_asked_for_beats_the_policy(policy, golden):
    policy("mixed_float16")
    model = TFOPTForCausalLM.from_pretrained(golden.folder, dtype="bfloat16")
    assert (model.dtype, model.compute_dtype) == ("bfloat16", "bfloat16")


@keras_on_numpy_2
@pytest.mark.parametrize("case_name", ["pre_norm", "post_norm", "untied_gelu"])
def test_keras_files_round_trip(tmp_path, case_name, inputs):
    model = TFOPTForCausalLM.from_pretrained(case(case_name).folder, attn_implementation="sdpa")
    ids = inputs["input_ids"] % model.config.vocab_size
    expected = model(ids).logits
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.config == model.config
    assert loaded.attn_implementation == "sdpa"
    assert np.array_equal(loaded(ids).logits, expected)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = TFOPTForCausalLM(model.config)
    assert not np.array_equal(fresh(ids).logits, expected)
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert np.array_equal(fresh(ids).logits, expected)


def test_lora_trains_changes_generation_and_is_merged_on_saving(model, inputs, tmp_path):
    ids = inputs["input_ids"]
    before = model.generate(ids, max_new_tokens=4)
    for layer in model.model.decoder.layers:
        layer.self_attn.q_proj.enable_lora(2)
        kernel = layer.self_attn.q_proj.lora_kernel_b
        kernel.assign(np.ones(kernel.shape))
    after = model.generate(ids, max_new_tokens=4)
    assert not np.array_equal(before, after), "compiled before LoRA, and not again"
    model.save_pretrained(tmp_path)
    merged = TFOPTForCausalLM.from_pretrained(tmp_path)
    assert_close(merged(ids).logits.numpy(), model(ids).logits.numpy(), "merged")


def test_variables_are_named_by_their_place(model):
    paths = {variable.path for variable in model.trainable_variables}
    assert "model/decoder/layers.0/self_attn/q_proj/kernel" in paths
    assert len(paths) == len(model.trainable_variables)


def test_initial_values_need_no_call():
    model = TFOPTForCausalLM(
        OPTConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=4)
    )
    assert model.built
    assert sum(v.shape.num_elements() for v in map(tf.convert_to_tensor, model.weights)) == (
        model.num_parameters()
    )
