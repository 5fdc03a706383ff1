# SPDX-License-Identifier: Apache-2.0
"""Classification and question answering as Keras users train them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_core import InputError
from opt_core.outputs import QuestionAnsweringOutput, SequenceClassifierOutput
from opt_tf import TFOPTForQuestionAnswering, TFOPTForSequenceClassification
from tests.tf.tiny import CONFIG as TINY
from tests.tf.tiny import IDS, KERAS_ON_NUMPY_2

CONFIG = TINY.replace(init_std=0.02, use_cache=True)
CLASSES = (IDS[:, -1] % 3).astype("int32")
SPAN = {
    "start_positions": np.argmax(IDS, axis=1).astype("int32"),
    "end_positions": np.argmin(IDS, axis=1).astype("int32"),
}
PAIR = tuple(SPAN.values())
pytestmark = pytest.mark.filterwarnings(KERAS_ON_NUMPY_2)


def compiled(cls, rate=2e-2, *, config=CONFIG, **options):
    keras.utils.set_random_seed(0)
    model = cls(config.replace(problem_type=None))
    model.compile(optimizer=keras.optimizers.Adam(rate), **{"jit_compile": False, **options})
    return model


def classifier(*arguments, **options):
    return compiled(TFOPTForSequenceClassification, *arguments, **options)


def reader(*arguments, **options):
    return compiled(TFOPTForQuestionAnswering, *arguments, **options)


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


CLASS_DATA = {
    "among the inputs": ({"input_ids": IDS, "labels": CLASSES}, None),
    "as the target": (IDS, CLASSES),
    "as a column": ({"input_ids": IDS}, CLASSES[:, None]),
}
SPAN_DATA = {
    "among the inputs": ({"input_ids": IDS, **SPAN}, None),
    "as a pair": (IDS, PAIR),
    "as a dict": (IDS, SPAN),
}


@pytest.mark.parametrize("where", CLASS_DATA)
def test_a_classifier_s_own_loss(where):
    model = classifier(run_eagerly=True)
    expected = float(model({"input_ids": IDS, "labels": CLASSES}).loss)
    x, y = CLASS_DATA[where]
    assert model.evaluate(x, y, batch_size=12, verbose=0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("where", SPAN_DATA)
def test_a_reader_s_own_loss(where):
    model = reader(run_eagerly=True)
    expected = float(model({"input_ids": IDS, **SPAN}).loss)
    x, y = SPAN_DATA[where]
    assert model.evaluate(x, y, batch_size=12, verbose=0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "jit_compile"),
    [
        (classifier, False),
        (reader, True),
        pytest.param(classifier, True, marks=pytest.mark.slow),
        pytest.param(reader, False, marks=pytest.mark.slow),
    ],
)
def test_both_learn(make, jit_compile):
    labels = {"labels": CLASSES} if make is classifier else SPAN
    inputs = {"input_ids": IDS, **labels}
    losses = make(jit_compile=jit_compile).fit(inputs, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]


ACCURACY = {
    "own loss, labels among the inputs": (None, "among the inputs"),
    "own loss": (None, "as the target"),
    "a loss given": (crossentropy(), "as the target"),
}


@pytest.mark.parametrize("what", ACCURACY)
def test_accuracy(what):
    loss, where = ACCURACY[what]
    model = classifier(0.0, loss=loss, metrics=["accuracy"])
    logits = model(IDS).logits.numpy()
    x, y = CLASS_DATA[where]
    found = model.evaluate(x, y, verbose=0, return_dict=True)
    assert found["accuracy"] == pytest.approx((logits.argmax(axis=-1) == CLASSES).mean())
    assert found["loss"] == pytest.approx(float(crossentropy()(CLASSES, logits)), rel=1e-5)


def test_a_reader_with_a_loss_and_metrics_for_both_ends():
    model = reader(0.0, loss=[crossentropy()] * 2, metrics=[["accuracy"], ["accuracy"]])
    own = float(model({"input_ids": IDS, **SPAN}).loss)
    found = model.evaluate(IDS, PAIR, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(2 * own, rel=1e-5)
    output = model(IDS)
    starts = output.start_logits.numpy().argmax(axis=-1) == PAIR[0]
    assert found["accuracy"] == pytest.approx(starts.mean())


def test_predictions_are_joined():
    model = classifier(config=CONFIG.replace(use_cache=False))
    found = model.predict(IDS, batch_size=5, verbose=0)
    assert isinstance(found, SequenceClassifierOutput)
    assert list(found) == ["logits"]
    np.testing.assert_allclose(found.logits, model(IDS).logits, rtol=1e-5, atol=1e-6)
    model = reader()
    found = model.predict(IDS, batch_size=5, verbose=0)
    assert isinstance(found, QuestionAnsweringOutput)
    for name in ("start_logits", "end_logits"):
        np.testing.assert_allclose(found[name], model(IDS)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem"),
    [
        (1, CLASSES.astype("float32"), "regression"),
        (3, np.eye(3, dtype="float32")[CLASSES], "multi_label_classification"),
        (3, CLASSES, "single_label_classification"),
    ],
)
def test_the_kind_of_problem_is_found_in_a_compiled_step(num_labels, labels, problem):
    model = classifier(config=CONFIG.replace(num_labels=num_labels))
    assert np.isfinite(model.evaluate(IDS, labels, verbose=0))
    assert model.config.problem_type == problem


def batches():
    for start in (0, 6):
        chosen = slice(start, start + 6)
        yield {"input_ids": IDS[chosen]}, CLASSES[chosen]


@pytest.mark.parametrize("kind", ["generator", "tf.data"])
def test_batches_from_elsewhere(kind):
    data = batches()
    if kind == "tf.data":
        data = tf.data.Dataset.from_tensor_slices(({"input_ids": IDS}, CLASSES)).batch(6)
    model = classifier()
    expected = float(model({"input_ids": IDS, "labels": CLASSES}).loss)
    assert model.evaluate(data, steps=2, verbose=0) == pytest.approx(expected, rel=1e-5)


WRONG = {
    "a class too high": (classifier, IDS, CLASSES + 1, "holds the class 3"),
    "labels of tokens": (classifier, IDS, IDS, r"expects the shape .*found \(12, 7\)"),
    "no labels": (classifier, {"input_ids": IDS}, None, "There are no labels to learn from"),
    "no span": (reader, {"input_ids": IDS}, None, "There are no labels to learn from"),
    "half a span": (
        reader,
        {"input_ids": IDS, "start_positions": PAIR[0]},
        None,
        "end_positions is missing",
    ),
    "half a pair": (reader, IDS, {"start_positions": PAIR[0]}, "is a pair"),
    "one array": (reader, IDS, np.stack(PAIR, axis=1), "is a pair"),
    "spans of tokens": (reader, IDS, (IDS, IDS), r"start_positions: expected the shape \(12,\)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_labels(what):
    make, x, y, message = WRONG[what]
    with pytest.raises(InputError, match=message):
        make(run_eagerly=True).fit(x, y, batch_size=12, verbose=0)


@pytest.mark.parametrize(
    ("make", "target"), [(classifier, CLASSES), (reader, PAIR)], ids=["classifier", "reader"]
)
def test_keras_files_round_trip(tmp_path, make, target):
    """With the optimizer: training goes on as it would have."""
    model = make(run_eagerly=True)
    names = {0: "low", 1: "middle", 2: "high"}
    model.config.id2label = names
    model.fit(IDS, target, batch_size=12, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert loaded.config.id2label == names
    for name, expected in model(IDS, use_cache=False).items():
        assert np.array_equal(loaded(IDS)[name], expected)
    for each in (model, loaded):
        each.fit(IDS, target, batch_size=12, verbose=0)
    for expected, found in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
