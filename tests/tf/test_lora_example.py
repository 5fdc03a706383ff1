# SPDX-License-Identifier: Apache-2.0
"""The example that trains adapters: what it learns, what it writes, how it goes on."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from examples import lora_tf
from examples.finetuning import measured, train_and_held_out
from opt_core.assets import TINY_SUMS
from opt_tf import OPTTokenizer, TFOPTForCausalLM
from tests.tf.tiny import KERAS_ON_NUMPY_2

pytestmark = pytest.mark.filterwarnings(KERAS_ON_NUMPY_2)


def train(folder, *options):
    plan = ["--output", str(folder), "--steps", "80", "--save-every", "40"]
    lora_tf.main([*plan, *options])


@pytest.fixture
def copied_on_the_way(tmp_path, monkeypatch):
    """The folder as it was when a state was first saved."""

    class CopyingTrainer(lora_tf.Trainer):
        def save(self, path):
            super().save(path)
            if not copied.exists():
                shutil.copytree(path.parent, copied)

    copied = tmp_path / "copied"
    monkeypatch.setattr(lora_tf, "Trainer", CopyingTrainer)
    return copied


def weights(folder):
    return TFOPTForCausalLM.from_pretrained(folder).get_weights()


def test_adapters_beside_eight_bits(tmp_path, copied_on_the_way):
    """The checkpoint has them in; going on from a state gives the same to the bit."""
    whole = tmp_path / "whole"
    train(whole)
    last = json.loads((whole / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 80 and last["rows_right"] > 0.3, last

    train(copied_on_the_way, "--resume")
    for expected, found in zip(weights(whole), weights(copied_on_the_way), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_the_checkpoint_has_learnt(tmp_path):
    """Which the base has not."""
    train(tmp_path)
    right = []
    for folder in (tmp_path, TINY_SUMS):
        model, tokenizer = (x.from_pretrained(folder) for x in (TFOPTForCausalLM, OPTTokenizer))
        held_out = train_and_held_out(lora_tf.parse([]), tokenizer)[1]
        right.append(measured(lora_tf.runner(model), held_out, 256)["rows_right"])
    assert right[0] > 0.3 and right[1] < 0.05, right


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float32", "int4"])
def test_other_bases(tmp_path, base):
    train(tmp_path, "--base", base, "--accumulate", "2")
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["rows_right"] > 0.2, last
