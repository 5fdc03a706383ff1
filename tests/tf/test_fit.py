# SPDX-License-Identifier: Apache-2.0
"""What `fit`, `evaluate` and `predict` take, and what they make of it."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_core import InputError, UnsupportedError
from opt_core.assets import TINY_SUMS
from opt_core.encodings import BatchEncoding
from opt_tf import (
    OPTTokenizer,
    TFOPTForCausalLM,
    TFOPTForQuestionAnswering,
    TFOPTForSequenceClassification,
    TFOPTModel,
)
from opt_tf.outputs import CausalLMOutput
from tests.tf.tiny import (
    CONFIG,
    IDS,
    LABELS,
    MASK,
    RANDOM,
    TASK,
    TEXTS,
    assert_same_weights,
    compiled,
    tiny,
)

#: Some programs take long to compile.
WAYS = [
    pytest.param({}, id="eager"),
    pytest.param({"jit_compile": True}, id="xla", marks=pytest.mark.slow),
]
CLASSES = (IDS[:, -1] % 3).astype("int32")
SPAN = (np.argmax(IDS, axis=1).astype("int32"), np.argmin(IDS, axis=1).astype("int32"))


def part(data, rows):
    return {name: array[rows] for name, array in data.items()}


def halves(wrap=dict):
    """Batches of the texts and their labels, as a generator yields them."""
    for rows in (slice(0, 6), slice(6, 12)):
        yield wrap(part(TEXTS, rows)), LABELS[rows]


class Halves(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return [*halves()][index]


SHORT = (np.arange(12) % 3 == 0)[:, None] & (np.arange(7) >= 4)
PADDED = {
    "input_ids": np.where(SHORT, 1, IDS),
    "attention_mask": np.where(SHORT, 0, 1),
    "labels": np.where(SHORT, -100, IDS),
}


def padded():
    """A data set of unknown size, whose rows are padded to the longest of their batch."""
    kinds = {name: tf.TensorSpec([None], tf.int32) for name in PADDED}

    def rows():
        for row in range(12):
            yield {name: array[row, ~SHORT[row]] for name, array in PADDED.items()}

    pads = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    data = tf.data.Dataset.from_generator(rows, output_signature=kinds)
    return data.padded_batch(12, padding_values=pads).prefetch(1)


KINDS = {
    "arrays": lambda: (TASK, None),
    "a target": lambda: (TEXTS, LABELS),
    "a list": lambda: ([IDS, MASK], LABELS),
    "tensors": lambda: ({name: tf.constant(array) for name, array in TASK.items()}, None),
    "an encoding": lambda: (BatchEncoding(TASK), None),
    "an encoding and a target": lambda: (BatchEncoding(TEXTS), LABELS),
    "tf.data": lambda: (tf.data.Dataset.from_tensor_slices(TASK).batch(6), None),
    "tf.data of pairs": lambda: (tf.data.Dataset.from_tensors((TEXTS, LABELS)), None),
    "tf.data of an encoding": lambda: (tf.data.Dataset.from_tensors(BatchEncoding(TASK)), None),
    "padded batches": lambda: (padded(), None),
    "a generator": lambda: (halves(), None),
    "a generator of encodings": lambda: (halves(BatchEncoding), None),
    "a PyDataset": lambda: (Halves(), None),
}


@pytest.fixture(scope="module")
def eager():
    return compiled(optimizer=keras.optimizers.SGD(0.0))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_loss(eager, kind):
    """Each half of the rows has as many labels, so that the mean of the halves is the whole's."""
    expected = float(eager(PADDED if kind == "padded batches" else TASK).loss)
    x, y = KINDS[kind]()
    batch_size = 12 if isinstance(x, dict | list) else None
    steps = {"padded batches": 1, "a generator": 2, "a generator of encodings": 2}.get(kind)
    found = eager.evaluate(x, y, batch_size, verbose=0, steps=steps)
    assert found == pytest.approx(expected, rel=1e-5)


def test_one_batch(eager):
    expected = float(eager(TASK).loss)
    for given in ((TASK,), (BatchEncoding(TASK),), (TEXTS, LABELS)):
        assert eager.train_on_batch(*given) == pytest.approx(expected, rel=1e-5)
        assert eager.test_on_batch(*given) == pytest.approx(expected, rel=1e-5)
    found = eager.predict_on_batch(TEXTS)
    assert isinstance(found, CausalLMOutput)
    assert [*found] == ["logits"]
    np.testing.assert_allclose(found.logits, eager(TEXTS).logits, rtol=1e-5, atol=1e-6)


def test_what_a_tokenizer_returns():
    tokenizer = OPTTokenizer.from_pretrained(TINY_SUMS)
    batch = tokenizer(["two plus two", "ten minus one is"], padding=True, return_tensors="np")
    model = compiled(config=CONFIG.replace(vocab_size=len(tokenizer)))
    batch["labels"] = np.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    assert np.isfinite(model.fit(batch, verbose=0).history["loss"][0])


@pytest.mark.parametrize("how", ["arrays", "a tuple", "a share"])
def test_validation(eager, how):
    options = {
        "arrays": {"x": TASK, "validation_data": TASK},
        "a tuple": {"x": TEXTS, "y": LABELS, "validation_data": (TEXTS, LABELS)},
        "a share": {"x": TASK, "validation_split": 0.5},
    }[how]
    expected = float(eager(TASK if how != "a share" else part(TASK, slice(6, 12))).loss)
    history = eager.fit(batch_size=12, verbose=0, **options).history
    assert history["val_loss"][0] == pytest.approx(expected, rel=1e-5)


def test_steps_of_an_endless_data_set():
    """Several of them run in one call of a program."""
    data = tf.data.Dataset.from_tensor_slices(TASK).batch(4)
    singly = compiled(jit_compile=False)
    singly.fit(data, epochs=2, verbose=0, shuffle=False)
    together = compiled(jit_compile=False, steps_per_execution=3)
    together.fit(data.repeat(), steps_per_epoch=3, epochs=2, verbose=0, shuffle=False)
    assert_same_weights(singly, together, rtol=1e-5, atol=1e-7)


def test_predictions_of_batches_are_joined(eager):
    expected = eager(TEXTS).logits
    for x in (TEXTS, [IDS, MASK], tf.data.Dataset.from_tensor_slices(TEXTS).batch(5)):
        batch_size = None if isinstance(x, tf.data.Dataset) else 5
        found = eager.predict(x, batch_size, verbose=0)
        assert [*found] == ["logits"]
        np.testing.assert_allclose(found.logits, expected, rtol=1e-5, atol=1e-6)
    assert eager.predict(TASK, 5, verbose=0).loss.shape == (3,), "one for each batch"


ROWS = RANDOM.random(12).astype("float32")
TOKENS = RANDOM.random((12, 7)).astype("float32")


@pytest.mark.parametrize("options", WAYS)
def test_weights_count_as_in_keras(options):
    """Keras' loss of the shifted labels, with the weights shifted likewise."""
    own = compiled(optimizer=keras.optimizers.SGD(0.1), **options)
    own.fit(TEXTS, LABELS, sample_weight=TOKENS, batch_size=12, verbose=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)
    given = compiled(optimizer=keras.optimizers.SGD(0.1), loss=loss)
    shifted = np.pad(LABELS[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    weights = np.pad(TOKENS[:, 1:], ((0, 0), (0, 1)))
    given.fit(TEXTS, shifted, sample_weight=weights, batch_size=12, verbose=0)
    assert_same_weights(given, own, rtol=1e-4, atol=1e-6)


def test_the_weight_of_a_row_is_that_of_its_labels(eager):
    rows = [ROWS, ROWS[:, None], np.repeat(ROWS[:, None], 7, axis=1)]
    losses = [eager.evaluate(TEXTS, LABELS, 12, verbose=0, sample_weight=x) for x in rows]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert losses[0] < 0.9 * float(eager(TASK).loss)


def test_a_weight_of_nought_is_a_label_that_teaches_nothing(eager):
    kept = np.arange(12) < 6
    found = eager.evaluate(TEXTS, LABELS, 12, verbose=0, sample_weight=kept.astype("float32"))
    half = float(eager(part(TASK, kept)).loss)
    counts = (LABELS[:, 1:] != -100).sum(1)
    assert found == pytest.approx(half * counts[kept].sum() / counts.sum(), rel=1e-5)
    weights = kept.astype("float32")
    found = eager.evaluate(tf.data.Dataset.from_tensors((TASK, None, weights)), verbose=0)
    assert found == pytest.approx(half * counts[kept].sum() / counts.sum(), rel=1e-5)


def test_weights_of_classes():
    factors = {0: 0.5, 1: 2.0, 2: 3.0}
    weights = np.vectorize(factors.get)(CLASSES).astype("float32")
    still = {"optimizer": keras.optimizers.SGD(0.0)}
    model = compiled(TFOPTForSequenceClassification, **still)
    logits = model(TEXTS).logits
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
    expected = float(np.mean(loss(CLASSES, logits) * weights))
    history = model.fit(TEXTS, CLASSES, 12, verbose=0, class_weight=factors).history
    assert history["loss"] == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_weights_of_numbers(num_labels):
    model = compiled(TFOPTForSequenceClassification, config=CONFIG.replace(num_labels=num_labels))
    labels = RANDOM.integers(0, 2, (12, num_labels)).astype("float32")
    logits = model(TEXTS).logits
    if num_labels == 1:
        losses = np.square(logits - labels)
    else:
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
    found = model.evaluate(TEXTS, labels, 12, verbose=0, sample_weight=ROWS)
    assert found == pytest.approx(float(np.mean(losses * ROWS[:, None])), rel=1e-5)


def test_weights_of_spans():
    model = compiled(TFOPTForQuestionAnswering)
    output = model(TEXTS)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
    ends = zip(SPAN, (output.start_logits, output.end_logits), strict=True)
    expected = np.mean([np.mean(loss(*pair) * ROWS) for pair in ends])
    data = tf.data.Dataset.from_tensors((TEXTS, SPAN, ROWS))
    assert model.evaluate(data, verbose=0) == pytest.approx(expected, rel=1e-5)


def test_losses_of_regularizers_count():
    model = compiled()
    model.model.decoder.layers[0].fc1.kernel_regularizer = keras.regularizers.L2(0.1)
    kernel = model.model.decoder.layers[0].fc1._kernel
    kernel.regularizer = keras.regularizers.L2(0.1)
    expected = float(model(TASK).loss) + 0.1 * float(np.sum(np.square(kernel.numpy())))
    assert model.evaluate(TASK, batch_size=12, verbose=0) == pytest.approx(expected, rel=1e-5)


def test_another_loss_finds_labels_among_the_inputs():
    def loss(target, logits):
        return keras.ops.mean(keras.ops.cast(target, "float32")) + 0.0 * keras.ops.mean(logits)

    model = compiled(loss=loss)
    found = model.evaluate(TASK, batch_size=12, verbose=0)
    assert found == pytest.approx(LABELS.mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("mixed_bfloat16", {}),
        ("mixed_float16", {"jit_compile": False}),
        pytest.param("mixed_float16", {"jit_compile": True}, marks=pytest.mark.slow),
    ],
)
def test_mixed_precision(policy, options):
    """Of one model, whatever the global policy; float16's loss is scaled by Keras, in a graph too."""
    model = compiled(dtype=policy, **options)
    losses = model.fit(TASK, batch_size=12, epochs=4, verbose=0).history["loss"]
    assert np.all(np.diff(losses) < 0)
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    is_scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (policy == "mixed_float16")
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize("options", WAYS)
def test_gradients_of_several_batches_as_of_one(options):
    """Each batch has as many labels as the others: Keras takes the mean of their means.

    The large epsilon keeps what should be 0, the gradient of a key's bias, from becoming a step.
    """
    whole = compiled(optimizer=keras.optimizers.AdamW(1e-2, epsilon=1e-3))
    optimizer = keras.optimizers.AdamW(1e-2, epsilon=1e-3, gradient_accumulation_steps=3)
    parts = compiled(optimizer=optimizer, **options)
    data = {"input_ids": IDS, "labels": IDS}
    for model, size in ((whole, 12), (parts, 4)):
        model.fit(data, batch_size=size, epochs=3, shuffle=False, verbose=0)
    assert_same_weights(whole, parts, rtol=1e-4, atol=1e-6)


def shape_of(rows, columns=None):
    return np.zeros((rows, *([columns] if columns else [])), "int32")


BAD = {
    "no labels": (TFOPTForCausalLM, TEXTS, None, {}, "There are no labels to learn from"),
    "too high": (TFOPTForCausalLM, IDS, IDS + 10, {}, "labels holds the token id"),
    "too low": (TFOPTForCausalLM, IDS, np.full_like(IDS, -2), {}, "labels holds the token id -2"),
    "too short": (TFOPTForCausalLM, IDS, shape_of(12, 6), {}, r"expected the shape \(12, 7\)"),
    "one for a row": (TFOPTForCausalLM, IDS, shape_of(12), {}, r"expected the shape \(12, 7\)"),
    "a mask too short": (
        TFOPTForCausalLM,
        {"input_ids": IDS, "attention_mask": MASK[:, 1:], "labels": IDS},
        None,
        {},
        "attention mask has length 6",
    ),
    "an unknown input": (
        TFOPTForCausalLM,
        {**TASK, "token_type_ids": MASK},
        None,
        {},
        "Unknown input 'token_type_ids'",
    ),
    "weights of other tokens": (
        TFOPTForCausalLM,
        IDS,
        IDS,
        {"sample_weight": TOKENS[:, 1:]},
        r"sample_weight: .* \(12,\), or for each label \(12, 7\); found the shape \(12, 6\)",
    ),
    "weights of tokens for classes": (
        TFOPTForSequenceClassification,
        IDS,
        CLASSES,
        {"sample_weight": TOKENS},
        r"found the shape \(12, 7\)",
    ),
    "more classes than labels": (
        TFOPTForSequenceClassification,
        IDS,
        CLASSES + 2,
        {},
        "holds the class 4",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_data(what):
    cls, x, y, options, message = BAD[what]
    with pytest.raises(InputError, match=message):
        compiled(cls).fit(x, y, batch_size=12, verbose=0, **options)


def test_a_base_model_has_no_loss():
    with pytest.raises(UnsupportedError, match="no loss of its own"):
        compiled(TFOPTModel).fit(IDS, IDS, verbose=0)


def test_outputs_without_names():
    model = compiled(TFOPTForCausalLM, config=CONFIG.replace(return_dict=False))
    with pytest.raises(InputError, match=r"return_dict.* is False. Set it to True"):
        model.fit({"input_ids": IDS, "labels": IDS}, batch_size=12, verbose=0)


def test_another_number_of_labels():
    """The labels of a checkpoint with another head are classes that this one does not have."""
    model = compiled(TFOPTForSequenceClassification, config=CONFIG.replace(num_labels=2))
    with pytest.raises(InputError, match="holds the class 2"):
        model.fit(IDS, CLASSES, batch_size=12, verbose=0)
    assert tiny(TFOPTForSequenceClassification)(IDS).logits.shape == (12, 3)
