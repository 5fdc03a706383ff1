# SPDX-License-Identifier: Apache-2.0
"""The three ways to hand inputs to a TensorFlow model."""

from __future__ import annotations

from collections import UserDict

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_core import InputError
from opt_core.encodings import BatchEncoding
from tests.tolerances import assert_close


def ways(ids, mask):
    """Every way to pass ids and a mask: name -> (positional, keyword) arguments."""
    rows, mask_rows = ids.tolist(), mask.tolist()
    return {
        "keywords": ((), {"input_ids": ids, "attention_mask": mask}),
        "tensor": ((tf.constant(ids),), {"attention_mask": tf.constant(mask)}),
        "list": (([ids, mask],), {}),
        "tuple": (((tf.constant(ids), tf.constant(mask)),), {}),
        "list of one": (([ids],), {"attention_mask": mask}),
        "dict": (({"input_ids": ids, "attention_mask": mask},), {}),
        "dict and keyword": (({"input_ids": ids},), {"attention_mask": mask}),
        "nested lists": ((rows,), {"attention_mask": mask_rows}),
        "list of nested lists": (([rows, mask_rows],), {}),
        "encoding": ((BatchEncoding({"input_ids": rows, "attention_mask": mask_rows}),), {}),
        "user dict": ((UserDict({"input_ids": ids, "attention_mask": mask}),), {}),
        "int64": (([ids.astype(np.int64), mask.astype(np.int64)],), {}),
    }


@pytest.mark.parametrize("way", list(ways(np.zeros((1, 1)), np.zeros((1, 1)))))
def test_every_way_gives_the_same(model, base, inputs, logits, golden, real, way):
    args, kwargs = ways(inputs["input_ids"], inputs["attention_mask"])[way]
    assert_close(model(*args, **kwargs).logits.numpy()[real], logits[real], way)
    hidden = golden.arrays["left/base/last_hidden_state"]
    assert_close(base(*args, **kwargs).last_hidden_state.numpy()[real], hidden[real], way)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("way", ["tuple", "list", "dict", "tensor"])
def test_every_way_in_a_compiled_function(model, inputs, logits, real, way, jit_compile):
    args, kwargs = ways(inputs["input_ids"], inputs["attention_mask"])[way]
    args, kwargs = tf.nest.map_structure(tf.constant, (args, kwargs))
    compiled = tf.function(model, jit_compile=jit_compile)
    assert_close(compiled(*args, **kwargs).logits.numpy()[real], logits[real], way)


def test_arguments_in_the_order_of_the_signature(model, base, inputs, logits, real):
    """In which the two classes differ: the reference's order."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert_close(model(ids, None, mask).logits.numpy()[real], logits[real], "causal")
    assert base(ids, mask).last_hidden_state.shape == (3, 7, 24)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_ids": [[3]], "token_type_ids": [[0]]}, "Unknown input 'token_type_ids'"),
        ([[3, 4], [5]], "rows of equal length"),
        ([3, 4, 5], r"expected the dimensions \(batch, sequence\)"),
        ([np.array([[3]]), *[None] * 5], "holds at most 5"),
        ([[103]], "holds the token id 103, but the vocabulary has the ids 0 to 102"),
        (None, "You have to specify either"),
    ],
)
def test_what_is_wrong_is_said(model, wrong, message):
    with pytest.raises(InputError, match=message):
        model(wrong)


WIDE = 2**32 + 1  # whose lower 32 bits are 1


@pytest.mark.parametrize(
    "rows", [[[3, WIDE]], np.array([[3, WIDE]]), np.array([[3, WIDE]], np.uint64)]
)
@pytest.mark.parametrize("name", ["attention_mask", "input_ids", "labels", "position_ids"])
def test_no_number_is_cut_to_32_bits(model, name, rows):
    for value in (rows, tf.constant(rows, tf.int64)):
        with pytest.raises(InputError, match=f"{name} holds.* {WIDE}"):
            model(**{"input_ids": [[3, 4]], name: value})


@pytest.mark.parametrize("rows", [[[2**70, 3]], [["a", "b"]], [[3], [4, 5]], [[None, 3]]])
def test_rows_that_are_no_numbers(model, rows):
    with pytest.raises(InputError, match="input_ids"):
        model(rows)


def test_a_name_given_twice(model):
    with pytest.raises(InputError, match="input_ids was given twice"):
        model({"input_ids": [[3]]}, input_ids=[[3]])


def test_the_message_is_ours_alone(model):
    """Keras adds pages of arguments to what is raised within `call`."""
    with pytest.raises(InputError) as caught:
        model([[103]])
    assert "Arguments received" not in str(caught.value)


@pytest.mark.parametrize("container", [list, dict])
def test_inside_a_functional_model(model, inputs, logits, real, container):
    ids = keras.Input((None,), dtype="int32", name="input_ids")
    mask = keras.Input((None,), dtype="int32", name="attention_mask")
    given = [ids, mask] if container is list else {"input_ids": ids, "attention_mask": mask}
    functional = keras.Model(given, model(given).logits)
    values = [inputs["input_ids"], inputs["attention_mask"]]
    values = values if container is list else dict(zip(given, values, strict=True))
    assert_close(functional.predict(values, verbose=0)[real], logits[real], "functional")


def test_layers_on_top_of_the_base_model(base, inputs):
    ids = keras.Input((None,), dtype="int32")
    scores = keras.layers.Dense(3)(base(ids).last_hidden_state)
    assert keras.Model(ids, scores)(inputs["input_ids"]).shape == (3, 7, 3)
