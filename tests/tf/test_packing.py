# SPDX-License-Identifier: Apache-2.0
"""Packed rows in a graph, which reads no values."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from opt_tf import TFOPTForCausalLM
from opt_tf.attention import KERNELS
from tests.cases import case

POSITIONS = np.array([[-1, 0, 1, 2, 0, 1, -1, -1], [0, 1, 2, 3, 0, 1, 2, 3]])
MASK = (POSITIONS >= 0).astype(np.int64)
IDS = np.where(MASK == 1, np.random.default_rng(0).integers(3, 103, (2, 8)), 1)
LABELS = np.where(POSITIONS < 1, -100, IDS)
TEXTS = [(0, slice(1, 4)), (0, slice(4, 6)), (1, slice(0, 4)), (1, slice(4, 8))]


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("kernel", [*KERNELS])
def test_texts_in_a_graph(kernel: str, jit_compile: bool) -> None:
    """Logits and gradients, and of rows of one text in the same program."""
    model = TFOPTForCausalLM.from_pretrained(case("pre_norm").folder, attn_implementation=kernel)
    variables = [variable.value for variable in model.trainable_variables]

    @tf.function(jit_compile=jit_compile)
    def step(position_ids):
        with tf.GradientTape() as tape:
            inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
            output = model(**inputs, position_ids=position_ids)
        gradients = tape.gradient(output.loss, variables)
        return output.logits, output.loss, [tf.convert_to_tensor(each) for each in gradients]

    logits, loss, found = step(tf.constant(POSITIONS))
    count = (LABELS != -100).sum()
    with tf.GradientTape() as tape:
        expected = 0.0
        for row, columns in TEXTS:
            ids = IDS[row : row + 1, columns]
            alone = model(input_ids=ids, labels=ids)
            np.testing.assert_allclose(logits[row, columns], alone.logits[0], atol=1e-5)
            expected += alone.loss * (ids.shape[1] - 1) / count
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for gradient, alone in zip(found, tape.gradient(expected, variables), strict=True):
        np.testing.assert_allclose(gradient, tf.convert_to_tensor(alone), rtol=1e-4, atol=2e-5)
    counted = np.where(MASK == 1, MASK.cumsum(axis=1) - 1, -1)
    again = step(tf.constant(counted))[0].numpy()
    plain = model(input_ids=IDS, attention_mask=MASK).logits.numpy()
    np.testing.assert_allclose(again[MASK == 1], plain[MASK == 1], atol=1e-5)
