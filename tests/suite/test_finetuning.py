# SPDX-License-Identifier: Apache-2.0
"""The examples that fine-tune a causal language model: they learn, and go on where they stopped."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from examples import finetuning
from opt_core.assets import TINY_SUMS
from opt_core.assets.sums import TrainingData
from opt_core.inputs import IGNORED_LABEL
from opt_core.tokenizer import OPTTokenizer
from tests.backends.base import Backend
from tests.suite.crashes import crash, log_of


@pytest.fixture
def script(backend: Backend) -> ModuleType:
    return importlib.import_module(f"examples.finetune_{backend.name}")


@pytest.fixture
def same_policy(backend: Backend) -> Iterator[None]:
    """Keras' dtype policy is that of the process; afterwards it is what it was."""
    if backend.name != "tf":
        yield
        return
    import keras

    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


def test_sums_in_other_words(
    backend: Backend, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model knows them; what it learns is another way to ask, also for those it never saw."""
    plan = ["--steps", "80", "--save-every", "40", "--learning-rate", "0.002"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    crash(monkeypatch, 64, parts)
    script.main([*plan, "--output", str(whole)])
    measured = log_of(whole)
    assert measured[-1]["rows_right"] > 0.3, "a guess is right once in a hundred times"
    assert measured[-1]["held_out_loss"] < measured[39]["held_out_loss"]
    if not backend.runs_all_programs:  # the loop is that of training from scratch
        return
    script.main([*plan, "--output", str(parts), "--resume"])
    assert log_of(parts) == measured
    name = "model.safetensors"
    assert (parts / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.usefixtures("same_policy")
def test_a_text_with_every_option(backend: Backend, script: Any, tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "output"
    text.write_text("one plus two minus seven\n\n eleven is forty-two\n" * 60)
    options = ["--accumulate", "2", "--gradient-checkpointing", "--bfloat16"]
    sizes = ["--steps", "40", "--batch-size", "8", "--block-size", "48", "--learning-rate", "0.003"]
    script.main(["--train-file", str(text), "--output", str(output), *sizes, *options])
    last = log_of(output)[-1]
    assert last["tokens_right"] > 0.8
    assert last["perplexity"] == pytest.approx(np.exp(last["held_out_loss"]))
    weights = backend.canonical_weights(backend.load(output))
    assert {array.dtype.name for array in weights.values()} == {"float32"}


def test_measures_of_rows_and_tokens() -> None:
    """Of five rows in batches of two, of which the last is filled up."""
    ids = np.arange(20).reshape(5, 4) + 1
    labels = np.where(np.arange(4) < [[1], [1], [2], [1], [3]], IGNORED_LABEL, ids)
    wrong = {(0, 3), (4, 3)}  # row and column of the label

    def run(batch: Any, targets: Any) -> tuple[float, Any]:
        assert batch.shape == (2, 4)
        counts = (targets[:, 1:] != IGNORED_LABEL).sum(1)
        chosen = np.roll(batch, -1, axis=1)
        for row, column in wrong:
            chosen[(batch == ids[row, column])[:, [1, 2, 3, 0]]] = 0
        return float((counts * batch[:, 0]).sum() / counts.sum()), chosen

    found = finetuning.measured(run, TrainingData(ids, labels), 2)
    counts = np.array([3, 3, 2, 3, 1])
    assert found["held_out_loss"] == pytest.approx((counts * ids[:, 0]).sum() / 12)
    assert found["tokens_right"] == pytest.approx(10 / 12)
    assert found["rows_right"] == pytest.approx(3 / 5)


def test_blocks_of_a_text(tmp_path: Path) -> None:
    tokenizer, file = OPTTokenizer.from_pretrained(TINY_SUMS), tmp_path / "text"
    file.write_bytes(b"one plus two\n\n  three \n")
    tokens = tokenizer.encode("one plus two") + tokenizer.encode("three")
    found = finetuning.blocks(tokenizer, file, 2)
    assert found.tolist() == np.reshape(tokens[: len(tokens) // 2 * 2], (-1, 2)).tolist()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (b"one\n\xff two\n", [], r"text\.txt, line 2: expected UTF-8"),
        (b"one two three\n", [], r"text\.txt: has 0 blocks of 64 tokens"),
        (b"one two three\n", ["--block-size", "3"], r"text\.txt: has 1 blocks of 3 tokens"),
        (b"one two three\n" * 9, ["--block-size", "4"], "--batch-size 32: there are only 8 rows"),
    ],
)
def test_texts_that_cannot_be_learnt(
    script: Any, tmp_path: Path, text: bytes, options: list[str], message: str
) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(text)
    with pytest.raises(SystemExit, match=message):
        script.main(["--train-file", str(file), "--output", str(tmp_path / "output"), *options])


def test_parts_that_do_not_fit(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--batch-size", "8", "--accumulate", "3"])
    assert "--accumulate 3 does not divide --batch-size 8" in capsys.readouterr().err
