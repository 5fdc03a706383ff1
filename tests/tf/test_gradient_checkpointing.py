# SPDX-License-Identifier: Apache-2.0
"""Layers computed again for their gradients: the same numbers, and nothing kept meanwhile.

A Keras Dropout would drop other elements the second time, and the gradients would be silently wrong.
"""

from __future__ import annotations

import re
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_core import OPTConfig
from opt_tf import TFOPTForCausalLM, TFOPTForSequenceClassification, TFOPTModel

CONFIG = OPTConfig(
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=24,
    max_position_embeddings=16,
    dropout=0.3,
    attention_dropout=0.2,
    init_std=0.1,
)
IDS = np.random.default_rng(0).integers(3, 61, (2, 7)).astype("int32")
MASK = np.ones_like(IDS)
MASK[0, :3] = 0
MODES = {"eager": None, "graph": {}, "xla": {"jit_compile": True}}


def compiled(function, mode):
    options = MODES[mode]
    return function if options is None else tf.function(function, autograph=False, **options)


def gradients(model, *arguments, **inputs):
    """Loss, and its gradient by every variable and by the arguments: head mask, keys and values."""
    names = ("head_mask", "past_key_values")[: len(arguments)]
    variables = [v.value for v in model.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        given = dict(zip(names, arguments, strict=True))
        loss = model(IDS, labels=IDS, training=True, **given, **inputs).loss
    wanted = [variables, arguments]
    found = tape.gradient(loss, wanted, unconnected_gradients="zero")
    return [loss, *map(tf.convert_to_tensor, tf.nest.flatten(found))]


def with_and_without(model, mode, *arguments, **inputs):
    """The same, kept and computed again, from the same seed."""
    found = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.model.decoder.seed_generator.state.assign([7, 0])
        run = compiled(lambda *given: gradients(model, *given, **inputs), mode)
        found.append([x.numpy() for x in run(*arguments)])
    return found


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_same(mode):
    """With dropout and layerdrop, by the variables, the head mask, and the keys and values of a cache."""
    model = TFOPTForCausalLM(CONFIG.replace(layerdrop=0.2))
    rng = np.random.default_rng(1)
    heads = tf.constant(rng.random((2, 2)), tf.float32)
    past = tuple(
        tuple(tf.constant(rng.normal(size=(2, 2, 1, 8)), tf.float32) for _ in "kv")
        for _ in range(2)
    )
    mask = np.pad(MASK, ((0, 0), (1, 0)), constant_values=1)
    plain, again = with_and_without(model, mode, heads, past, attention_mask=mask)
    assert len(plain) == 1 + len(model.trainable_variables) + 1 + 4
    for expected, found in zip(plain, again, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert sum(np.abs(x).max() > 0 for x in plain) > 20


@pytest.mark.parametrize(
    "policy", ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)]
)
def test_mixed_precision(policy):
    model = TFOPTForCausalLM(CONFIG, dtype=policy)
    plain, again = with_and_without(model, "graph", attention_mask=MASK)
    for expected, found in zip(plain, again, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"run_eagerly": True}, pytest.param({"jit_compile": True}, marks=pytest.mark.slow)],
)
def test_fit(options):
    weights = []
    for checkpointing in (False, True):
        keras.utils.set_random_seed(0)
        model = TFOPTForCausalLM(CONFIG)
        model.compile(optimizer=keras.optimizers.SGD(0.1), **options)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.fit({"input_ids": IDS, "labels": IDS}, epochs=3, verbose=0)
        weights.append(model.get_weights())
    for expected, found in zip(*weights, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def watched(model):
    """What the activations of the model's layers return from here on, weakly."""
    seen = []

    def activation(x):
        y = tf.nn.relu(x)
        seen.append(weakref.ref(y))
        return y

    for layer in model.model.decoder.layers:
        layer.activation = activation
    return seen


def test_switched_between_two_fits():
    """The second `fit` does not run what the first has compiled."""
    model = TFOPTForCausalLM(CONFIG)
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    seen, calls = watched(model), []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        seen.clear()
        model.fit({"input_ids": IDS, "labels": IDS}, verbose=0)
        calls.append(len(seen))
    assert calls[1] == 2 * calls[0] > 0


def test_activations_are_not_kept():
    """Those inside a layer are gone before the backward pass, unless they are kept for it."""
    model = TFOPTForCausalLM(CONFIG)
    alive, seen = [], watched(model)
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        seen.clear()
        with tf.GradientTape() as tape:
            loss = model(IDS, labels=IDS, training=True).loss
        alive.append([ref() is not None for ref in seen])
        tape.gradient(loss, model.trainable_variables[0].value)
    assert alive == [[True, True], [False, False]]
    assert len(seen) == 4


def test_a_compiler_does_not_merge_both_computations():
    """XLA would, were the second not made to wait for the gradient that it is needed for."""
    model = TFOPTForCausalLM(CONFIG.replace(num_hidden_layers=1))
    products = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        run = tf.function(lambda: gradients(model), autograph=False, jit_compile=True)
        program = run.experimental_get_compiler_ir()(stage="optimized_hlo")
        products.append(len(re.findall(r" dot\(|custom-call\(.*matmul", program)))
    # The three projections, the scores and the first layer of the feed-forward network.
    assert products[1] >= products[0] + 5


def test_a_cache_is_not_kept_in_training_alone(monkeypatch):
    monkeypatch.setattr("opt_core.calls._told", set())
    model = TFOPTForCausalLM(CONFIG)
    model.gradient_checkpointing_enable()
    assert model(IDS, use_cache=True).past_key_values is not None
    assert model(IDS, training=True).past_key_values is None
    with pytest.warns(UserWarning, match="use_cache=True has no effect"):
        assert model(IDS, training=True, use_cache=True).past_key_values is None
    model(IDS, training=True, use_cache=True)  # said once
    model.gradient_checkpointing_disable()
    assert model(IDS, training=True).past_key_values is not None


def test_hidden_states_and_attention_weights_are_still_shown():
    model = TFOPTForCausalLM(CONFIG.replace(dropout=0.0, attention_dropout=0.0))
    shown = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
    expected = model(IDS, training=True, **shown)
    model.gradient_checkpointing_enable()
    found = model(IDS, training=True, **shown)
    for kind, count in (("attentions", 2), ("hidden_states", 3)):
        assert len(found[kind]) == count
        for left, right in zip(found[kind], expected[kind], strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-6)


@pytest.mark.parametrize("cls", [TFOPTModel, TFOPTForCausalLM, TFOPTForSequenceClassification])
def test_every_class_has_the_switch(cls):
    model = cls(CONFIG)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert "gradient_checkpointing" not in model.config.to_dict()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
