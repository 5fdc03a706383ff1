# SPDX-License-Identifier: Apache-2.0
"""Keras' callbacks around `fit`: saving, going on after an interruption, stopping, other rates."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from opt_tf import TFOPTForSequenceClassification
from tests.tf.tiny import (
    CONFIG,
    IDS,
    KERAS_ON_NUMPY_2,
    TASK,
    TEXTS,
    assert_same_weights,
    compiled,
)

pytestmark = pytest.mark.filterwarnings(KERAS_ON_NUMPY_2)


class Interruption(Exception):
    """What stops a training from outside."""


def interrupted_at(step):
    """Counts the batches of all epochs."""
    seen = []

    def count(batch, logs=None):
        seen.append(batch)
        if len(seen) == step:
            raise Interruption

    return keras.callbacks.LambdaCallback(on_train_batch_end=count)


def train(model, folder, *others, **options):
    backup = keras.callbacks.BackupAndRestore(folder, **options)
    callbacks = [backup, *others]  # in this order: the batch that is interrupted was saved
    model.fit(TASK, batch_size=4, epochs=4, shuffle=False, verbose=0, callbacks=callbacks)
    return model


def test_an_interrupted_training_goes_on_from_its_last_epoch(tmp_path):
    """To the bit: moments are restored, and the state of dropout's seeds."""
    config = CONFIG.replace(dropout=0.3)
    expected = train(compiled(config=config), tmp_path / "whole")
    with pytest.raises(Interruption):
        train(compiled(config=config), tmp_path / "parts", interrupted_at(8))
    found = train(compiled(config=config), tmp_path / "parts")
    assert int(found.optimizer.iterations) == 12
    assert_same_weights(expected, found)


def test_a_backup_within_an_epoch_begins_the_epoch_again(tmp_path):
    """Keras notes the batch, and does not skip those before it."""
    with pytest.raises(Interruption):
        train(compiled(), tmp_path / "parts", interrupted_at(8), save_freq=2)
    found = train(compiled(), tmp_path / "parts", save_freq=2)
    assert int(found.optimizer.iterations) == 8 + 2 * 3


@pytest.mark.parametrize("name", ["best.weights.h5", "best.keras"])
def test_the_best_weights_are_kept(tmp_path, name):
    """A rate so high that a later epoch is worse."""
    path = tmp_path / name
    weights_only = name.endswith("h5")
    keep = keras.callbacks.ModelCheckpoint(
        path, "loss", save_best_only=True, save_weights_only=weights_only
    )
    kept = {}

    def note(epoch, logs):
        kept[logs["loss"]] = model.get_weights()

    model = compiled(optimizer=keras.optimizers.SGD(3.0))
    model.fit(
        TASK,
        batch_size=12,
        epochs=4,
        verbose=0,
        callbacks=[keep, keras.callbacks.LambdaCallback(on_epoch_end=note)],
    )
    losses = [*kept]
    assert min(losses) < losses[-1]
    loaded = compiled() if weights_only else keras.saving.load_model(path)
    if weights_only:
        loaded.load_weights(path)
    for expected, found in zip(kept[min(losses)], loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_stopping_early_brings_the_best_weights_back():
    stop = keras.callbacks.EarlyStopping("loss", patience=1, restore_best_weights=True)
    model = compiled(optimizer=keras.optimizers.SGD(3.0))
    history = model.fit(TASK, batch_size=12, epochs=20, verbose=0, callbacks=[stop]).history
    assert len(history["loss"]) < 20
    assert min(history["loss"]) < history["loss"][-1]


def test_the_rate_falls_where_the_loss_does_not():
    model = compiled(optimizer=keras.optimizers.SGD(1.0))
    fall = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=100)
    model.fit(TASK, batch_size=12, epochs=3, verbose=0, callbacks=[fall])
    assert float(model.optimizer.learning_rate) == 0.25


def test_a_loss_that_is_no_number_ends_the_training():
    """A batch without a label that counts has none."""
    stop = keras.callbacks.TerminateOnNaN()
    labels = np.where(np.arange(12)[:, None] < 6, -100, IDS)
    model = compiled(TFOPTForSequenceClassification)
    classes = np.full(12, -100, "int32")
    history = model.fit(TEXTS, classes, 12, epochs=3, verbose=0, callbacks=[stop]).history
    assert len(history["loss"]) == 1
    data = {**TEXTS, "labels": labels}
    model = compiled()
    model.fit(data, batch_size=6, epochs=3, shuffle=False, verbose=0, callbacks=[stop])
    assert int(model.optimizer.iterations) == 1
