# SPDX-License-Identifier: Apache-2.0
"""TensorFlow's own checkpoints hold every variable, and restore it into a fresh model."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_tf import (
    TFOPTForCausalLM,
    TFOPTForQuestionAnswering,
    TFOPTForSequenceClassification,
    TFOPTModel,
)
from tests.tf.tiny import CONFIG, KERAS_ON_NUMPY_2, TASK, TEXTS, assert_same_weights, compiled

POST_NORM = CONFIG.replace(num_hidden_layers=2, word_embed_proj_dim=12, do_layer_norm_before=False)
UNTIED = CONFIG.replace(tie_word_embeddings=False)
CLASSES = (
    TFOPTModel,
    TFOPTForCausalLM,
    TFOPTForSequenceClassification,
    TFOPTForQuestionAnswering,
)


def plain(model):
    """As it was made."""


def resized(model):
    model.resize_token_embeddings(70)


def with_head(model):
    head = keras.layers.Dense(61, use_bias=False, name="lm_head")
    head.build((None, 16))
    model.set_output_embeddings(head)


def tied(model):
    model.config.tie_word_embeddings = True
    model.tie_weights()


def with_lora(model):
    model.enable_lora(2)


def rounded(model):
    model.quantize("int8")


def random(model, seed=0):
    """The model, with other values in every variable."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        variable.assign(rng.integers(1, 100, variable.shape))
    return model


def stored(path):
    """The names of all variables in a checkpoint."""
    return [name for name, _ in tf.train.list_variables(path) if name.endswith("VARIABLE_VALUE")]


def check(model, fresh, path):
    """One model's checkpoint holds all it has, and gives it to another, exactly."""
    path = tf.train.Checkpoint(model=random(model)).write(path)
    assert len(stored(path)) == len(model.variables)
    status = tf.train.Checkpoint(model=fresh).read(path)
    status.assert_consumed()
    status.assert_existing_objects_matched()
    assert_same_weights(model, fresh)


@pytest.mark.parametrize("config", [CONFIG, POST_NORM, UNTIED], ids=["tied", "post_norm", "untied"])
@pytest.mark.parametrize("cls", CLASSES)
def test_every_variable_of_every_class(cls, config, tmp_path):
    check(cls(config), random(cls(config), 1), str(tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (resized, CONFIG),
        (resized, UNTIED),
        (with_head, UNTIED),
        (tied, UNTIED),
        (with_lora, CONFIG),
        pytest.param(rounded, CONFIG, marks=pytest.mark.filterwarnings(KERAS_ON_NUMPY_2)),
    ],
)
def test_after_a_change_of_the_model(change, config, tmp_path):
    models = [TFOPTForCausalLM(config.replace()) for _ in range(2)]
    for model in models:
        change(model)
    check(*models, str(tmp_path / "checkpoint"))


def test_a_model_that_was_loaded(tmp_path):
    """Its variables are made when its layers are there already."""
    random(TFOPTForCausalLM(CONFIG), 2).save_pretrained(tmp_path)
    loaded = TFOPTForCausalLM.from_pretrained(tmp_path)
    check(loaded, TFOPTForCausalLM(CONFIG), str(tmp_path / "checkpoint"))


def test_what_another_model_lacks_is_an_error(tmp_path):
    path = tf.train.Checkpoint(model=TFOPTForCausalLM(UNTIED)).write(str(tmp_path / "checkpoint"))
    with pytest.raises(AssertionError):
        tf.train.Checkpoint(model=TFOPTForCausalLM(CONFIG)).read(path).assert_consumed()


@pytest.mark.parametrize("change", [plain, with_lora])
def test_training_goes_on_with_a_manager(change, tmp_path):
    """The optimizer's moments and the seeds of dropout are restored too."""
    config = CONFIG.replace(dropout=0.2, num_hidden_layers=2)

    def started():
        model = TFOPTForCausalLM(config)
        change(model)
        model.compile(optimizer=keras.optimizers.Adam(1e-2), run_eagerly=True, jit_compile=False)
        return model

    def train(model):
        model.fit(TASK, batch_size=6, epochs=1, shuffle=False, verbose=0)

    first, second = started(), started()
    train(first)
    train(second)  # makes its optimizer's variables
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(model=first, optimizer=first.optimizer), tmp_path, max_to_keep=1
    )
    path = manager.save()
    restored = tf.train.Checkpoint(model=second, optimizer=second.optimizer)
    restored.restore(path).assert_existing_objects_matched()
    assert_same_weights(first, second)
    for left, right in zip(first.optimizer.variables, second.optimizer.variables, strict=True):
        np.testing.assert_array_equal(left.numpy(), right.numpy(), left.path)
    train(first)
    train(second)
    assert_same_weights(first, second)


def test_names_follow_the_layers(tmp_path):
    """Another number of layers is seen: none takes another's place."""
    path = tf.train.Checkpoint(model=compiled(config=POST_NORM)).write(str(tmp_path / "checkpoint"))
    found = {name.split("/")[3] for name in stored(path) if "/layer-" in name}
    assert found == {"layer-0", "layer-1"}
    assert np.isfinite(TFOPTForCausalLM(POST_NORM)(TEXTS).logits).all()


def test_a_head_that_nothing_has_called_yet(tmp_path):
    """Its variables did not exist, so the checkpoint lacked them and passed its own check."""
    model, fresh = (TFOPTForCausalLM(UNTIED) for _ in range(2))
    for each in (model, fresh):
        each.set_output_embeddings(keras.layers.Dense(61, use_bias=False, name="lm_head"))
    check(model, fresh, str(tmp_path / "model"))
