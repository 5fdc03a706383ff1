# SPDX-License-Identifier: Apache-2.0
"""`prepare_for_decoding`, and how the products of one row are compiled."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_core import InputError, UnsupportedError
from opt_tf import TFOPTForCausalLM
from opt_tf.parts import Linear

PROMPT = [[2, 5, 6, 7, 8]]
#: What Keras itself does with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept")


def built(kind: type[keras.layers.Dense]) -> keras.layers.Dense:
    layer = kind(64, kernel_initializer="glorot_normal", bias_initializer="random_normal")
    layer.build((None, 48))
    return layer


@pytest.mark.parametrize(("kind", "fused"), [(Linear, False), (keras.layers.Dense, True)])
def test_xla_keeps_a_product_of_one_row_apart_from_its_bias(kind, fused):
    """Fused, the product runs on one thread: decoding took 1.5 times as long.

    If Keras' own layer is no longer fused, `Linear` has no need to write its sum as a difference.
    """
    if tf.config.list_logical_devices("GPU"):
        pytest.skip("on a GPU Linear is Keras' own layer")
    layer = built(kind)
    compiled = tf.function(lambda x: layer(x), jit_compile=True)
    text = compiled.experimental_get_compiler_ir(tf.ones((1, 1, 48)))(stage="optimized_hlo")
    assert ("kind=kOutput" in text) is fused, text


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_difference_is_the_sum(jit_compile):
    layer = built(Linear)
    x = tf.random.stateless_normal((1, 3, 48), (1, 2))
    found = tf.function(lambda: layer(x), jit_compile=jit_compile)()
    product = tf.function(lambda: keras.ops.matmul(x, layer.kernel), jit_compile=jit_compile)()
    np.testing.assert_array_equal(found, product + layer.bias)


def test_exact_weights_stay_as_they_are(model, inputs):
    logits, weights = model(inputs).logits.numpy(), model.get_weights()
    assert model.prepare_for_decoding(batch_size=8) is model
    np.testing.assert_array_equal(model(inputs).logits, logits)
    for found, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_int8_rounds_each_linear_layer_and_nothing_else(model, inputs):
    exact, table = model(inputs).logits.numpy(), model.get_input_embeddings().embeddings.numpy()
    kernels = {x.path: x.numpy() for x in model.variables if x.path.endswith("/kernel")}
    assert model.prepare_for_decoding(weights="int8") is model
    rounded = [x for x in model._flatten_layers() if isinstance(x, Linear)]
    assert {str(layer._kernel.dtype) for layer in rounded} == {"int8"}
    for layer in rounded:
        kernel = kernels[layer._kernel.path]
        found = np.asarray(layer._kernel) / np.asarray(layer.kernel_scale)
        step = np.abs(kernel).max(axis=0) / 127
        assert (np.abs(found - kernel) <= 0.51 * step + 1e-7).all(), layer.path
    np.testing.assert_array_equal(model.get_input_embeddings().embeddings, table)
    error = np.abs(model(inputs).logits.numpy() - exact).max()
    assert 0 < error < 0.05 * np.abs(exact).max()


def test_int8_is_compiled_anew_and_continues(model):
    """A prepared model decodes what it says itself when it is called."""
    model.generate(PROMPT, max_new_tokens=3, eos_token_id=None)
    model.prepare_for_decoding(weights="int8")
    found = model.generate(PROMPT, max_new_tokens=3, eos_token_id=None).numpy()
    expected = list(PROMPT[0])
    for _ in range(3):
        expected.append(int(np.argmax(model(np.array([expected], np.int32)).logits[0, -1])))
    assert found.tolist() == [expected]
    model.prepare_for_decoding(weights="int8")  # a second time: nothing left to round


def test_int8_weights_are_saved_by_keras_alone(model, golden, inputs, tmp_path):
    model.prepare_for_decoding(weights="int8")
    logits = model(inputs).logits.numpy()
    with pytest.raises(UnsupportedError, match="is quantized"):
        model.save_pretrained(tmp_path / "checkpoint")
    model.save_weights(tmp_path / "int8.weights.h5")
    again = TFOPTForCausalLM(golden.config).prepare_for_decoding(weights="int8")
    again.load_weights(tmp_path / "int8.weights.h5")
    np.testing.assert_array_equal(again(inputs).logits, logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weights": "int4"}, "weights: expected None or 'int8'"), ({"batch_size": 0}, "batch_size")],
)
def test_what_cannot_be_prepared_for(model, options, message):
    with pytest.raises(InputError, match=message):
        model.prepare_for_decoding(**options)
