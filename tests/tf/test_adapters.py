# SPDX-License-Identifier: Apache-2.0
"""Keras' LoRA and quantization: what learns, what is written, what is refused."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_core import InputError, UnsupportedError
from opt_tf import TFOPTForCausalLM, TFOPTForSequenceClassification
from opt_tf.adapters import leaves
from tests.tf.tiny import CONFIG, IDS, KERAS_ON_NUMPY_2, TASK, TEXTS, tiny

pytestmark = pytest.mark.filterwarnings(KERAS_ON_NUMPY_2)

UNTIED = CONFIG.replace(tie_word_embeddings=False)


def logits(model):
    return model(TEXTS).logits.numpy()


def adapted(*arguments, model=None, **options):
    """A model with LoRA that has learnt."""
    model = model or tiny()
    model.enable_lora(*arguments, **options)
    model.compile(optimizer=keras.optimizers.Adam(0.05), run_eagerly=True)
    losses = model.fit(TASK, batch_size=12, epochs=3, verbose=0).history["loss"]
    assert np.all(np.diff(losses) < 0)
    return model


def test_lora_alone_learns():
    before = tiny()
    model = adapted(2)
    places = {variable.path.split("/", 3)[-1] for variable in model.trainable_variables}
    ends = {
        f"self_attn/{layer}/lora_kernel_{side}" for layer in ("q_proj", "v_proj") for side in "ab"
    }
    assert places == ends
    frozen = {v.path: v.numpy() for v in model.variables if "lora" not in v.path}
    for variable in before.variables:
        if "seed" not in variable.path:
            assert np.array_equal(frozen[variable.path], variable), variable.path


def test_a_fresh_adapter_changes_nothing():
    model = tiny()
    before = logits(model)
    model.enable_lora(4)
    assert np.array_equal(logits(model), before)


def test_alpha_scales_what_was_learnt():
    once, twice = adapted(2, 2.0), tiny()
    twice.enable_lora(2, 4.0)
    for left, right in zip(leaves(once), leaves(twice), strict=True):
        right.set_weights(left.get_weights())
    assert np.abs(logits(once) - logits(tiny())).max() > 1e-3
    half = tiny()
    half.merge_lora(once).merge_lora(once)
    np.testing.assert_allclose(logits(twice), logits(half), rtol=1e-4, atol=1e-5)


def test_the_head_of_a_task_learns_in_full():
    model = tiny(TFOPTForSequenceClassification)
    model.enable_lora(2, targets=["fc1"])
    names = sorted(variable.path.split("/", 1)[1] for variable in model.trainable_variables)
    fc1 = "decoder/layers.0/fc1/lora_kernel"
    assert names == [f"{fc1}_a", f"{fc1}_b", "score/kernel"]


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
def test_what_was_learnt_is_merged_on_saving(tmp_path, dtype):
    """In float32, and rounded once to what the model's variables are."""
    model = adapted(2, model=tiny(dtype=dtype))
    model.save_pretrained(tmp_path)
    merged = TFOPTForCausalLM.from_pretrained(tmp_path, dtype="float32")
    plain = tiny(dtype=dtype)
    layer = model.model.decoder.layers[0].self_attn.q_proj
    product = layer.lora_kernel_a.numpy() @ layer.lora_kernel_b.numpy()
    kernel = plain.model.decoder.layers[0].self_attn.q_proj.kernel
    expected = tf.cast(tf.cast(kernel, tf.float32) + product, kernel.dtype)
    found = merged.model.decoder.layers[0].self_attn.q_proj.kernel
    np.testing.assert_allclose(found, tf.cast(expected, tf.float32), rtol=1e-6, atol=1e-7)
    assert np.abs(found - tf.cast(kernel, tf.float32)).max() > 1e-3
    if dtype == "float32":
        np.testing.assert_allclose(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_word_embeddings_with_lora_are_merged_too(tmp_path):
    model = tiny()
    table = model.get_input_embeddings()
    table.enable_lora(2)
    table.lora_embeddings_b.assign(np.random.default_rng(1).normal(size=(2, 16)))
    model.save_pretrained(tmp_path)
    merged = TFOPTForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    assert np.abs(logits(model) - logits(tiny())).max() > 1e-2


def test_a_file_of_keras_holds_the_sum_and_an_adapter_begins_again(tmp_path):
    """Keras would set both factors to 0, and they would never learn again."""
    model = adapted(2)
    before = logits(model)
    model.save_weights(tmp_path / "model.weights.h5")
    model.save(tmp_path / "model.keras")
    model.load_weights(tmp_path / "model.weights.h5")
    for each in (model, keras.saving.load_model(tmp_path / "model.keras")):
        np.testing.assert_allclose(logits(each), before, rtol=1e-4, atol=1e-5)
        each.fit(TASK, batch_size=12, epochs=2, verbose=0)
        assert np.abs(logits(each) - before).max() > 1e-3
        assert len(each.trainable_variables) == 4


#: The largest error of the logits, of which the largest is 1.4.
ERRORS = {"int8": 0.06, "int4": 0.6, "float8": 0.25}


@pytest.mark.parametrize("mode", ERRORS)
def test_a_quantized_model(tmp_path, mode):
    """A tied table of embeddings is the head, and stays; a Keras file holds what was rounded."""
    model = tiny()
    before = logits(model)
    model.quantize(mode)
    error = np.abs(logits(model) - before).max()
    assert 1e-4 < error < ERRORS[mode]
    modes = {layer.name: layer.quantization_mode for layer in leaves(model)}
    assert {name for name, found in modes.items() if found} == {
        *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    }
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert {layer.name: layer.quantization_mode for layer in leaves(loaded)} == modes
    np.testing.assert_array_equal(logits(loaded), logits(model))
    with pytest.raises(UnsupportedError, match=rf"quantized \({mode}\)"):
        model.save_pretrained(tmp_path)


def test_embeddings_that_are_no_head_are_rounded_too():
    model = tiny(config=UNTIED)
    before = logits(model)
    model.quantize("int8")
    assert model.get_input_embeddings().quantization_mode == "int8"
    assert np.abs(logits(model) - before).max() < ERRORS["int8"]


@pytest.mark.parametrize(
    ("filters", "count"), [("fc", 2), (["^q_", "^v_"], 2), (lambda layer: layer.name == "fc1", 1)]
)
def test_some_layers(filters, count):
    model = tiny(config=UNTIED)
    model.quantize(
        config=keras.quantizers.Int8QuantizationConfig(activation_quantizer=None), filters=filters
    )
    assert sum(layer.quantization_mode == "int8" for layer in leaves(model)) == count


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_adapters_of_a_quantized_model(mode):
    """What they learn is merged into weights that were never rounded."""
    model = tiny()
    model.quantize(mode)
    adapted(2, model=model)
    merged = tiny().merge_lora(model)
    assert np.abs(logits(merged) - logits(model)).max() < ERRORS[mode]
    losses = [float(each(TASK).loss) for each in (merged, tiny())]
    assert losses[0] < losses[1] - 0.05


def test_generation_after_each_change():
    """Nothing is run that was compiled before."""
    model = tiny()
    options = {"max_new_tokens": 4, "do_sample": False}
    prompt = IDS[:1]
    model.generate(prompt, **options)
    model.quantize("int8")
    model.enable_lora(2, targets=["fc2"])
    model.model.decoder.layers[0].fc2.lora_kernel_b.assign(np.ones((2, 16)))
    found = model.generate(prompt, **options).numpy()
    ids = prompt
    for _ in range(4):
        ids = np.append(ids, np.argmax(model(ids).logits[:, -1], -1)[:, None], axis=1)
    np.testing.assert_array_equal(found, ids)


def float8():
    model = tiny()
    model.quantize("float8")
    return model


def with_lora():
    model = tiny()
    model.enable_lora(2)
    return model


def rounded_head():
    model = tiny()
    model.get_input_embeddings().quantize("int8")
    return model


def calibrated():
    config = keras.quantizers.GPTQConfig(dataset=["a text"], tokenizer=None)
    tiny().quantize(config=config)


REFUSED = {
    "no such layer": (lambda: tiny().enable_lora(2, targets=["x_proj"]), "named .*x_proj"),
    "a head": (
        lambda: tiny(TFOPTForSequenceClassification).enable_lora(2, targets=["score"]),
        "named .*score",
    ),
    "no rank": (lambda: tiny().enable_lora(0), "at least 1, found 0"),
    "twice": (lambda: with_lora().enable_lora(2), "LoRA already"),
    "float8 and LoRA": (lambda: float8().enable_lora(2), "no LoRA beside float8"),
    "calibration": (calibrated, "int8, int4, float8"),
    "a rounded head": (lambda: rounded_head()(IDS), "the head tied to them"),
    "other sizes": (lambda: rounded_head().resize_token_embeddings(70), "cannot be resized"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what):
    call, message = REFUSED[what]
    with pytest.raises((InputError, UnsupportedError), match=message):
        call()


def test_a_layer_without_weights_takes_no_lora():
    """Keras' own message; ours are built when they are made."""
    with pytest.raises(ValueError, match="isn't yet built"):
        keras.layers.Dense(3).enable_lora(2)
