# SPDX-License-Identifier: Apache-2.0
"""Training from scratch, as the examples do it: the reference's losses, stops that leave no trace, learning.

The losses are what transformers 4.37.2 and torch.optim.AdamW get from the same weights and rows.
"""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from examples import finetuning, sums
from examples.training import shuffled
from opt_core.assets import TINY_SUMS
from opt_core.assets.sums import TrainingData, encode_problems, problems
from opt_core.inputs import IGNORED_LABEL
from opt_core.tokenizer import OPTTokenizer
from tests.backends.base import Backend
from tests.cases import GOLDEN, bits, case
from tests.suite.crashes import crash, log_of

EXPECTED = json.loads((GOLDEN / "training.json").read_text())
#: Keras adds epsilon before it corrects the moments, the others after.
TOLERANCES = {"torch": 1e-5, "tf": 1e-3, "flax": 1e-4}
RATES = {"dropout": 0.3, "attention_dropout": 0.2, "layerdrop": 0.2}
SMALL = case("pre_norm").config.replace(num_hidden_layers=1, **RATES)
IDS, LABELS = (np.array(EXPECTED["pre_norm"][name]) for name in ("input_ids", "labels"))
STEPS = 10


@pytest.fixture
def script(backend: Backend) -> ModuleType:
    return importlib.import_module(f"examples.from_scratch_{backend.name}")


@pytest.mark.parametrize(("name", "parts"), [("pre_norm", 1), ("post_norm", 2)])
def test_losses_of_twenty_steps(backend: Backend, script: Any, name: str, parts: int) -> None:
    """Also of batches in parts, in each of which as many labels count."""
    expected = EXPECTED[name]
    steps = len(expected["losses"])
    model = backend.load(case(name).folder, dropout=0.0)
    trainer = script.Trainer(model, EXPECTED["peak"], steps, parts=parts)
    rows = zip(np.array(expected["input_ids"]), np.array(expected["labels"]), strict=True)
    losses = [trainer.train(*batch) for batch in rows]
    np.testing.assert_allclose(losses, expected["losses"], rtol=TOLERANCES[backend.name])
    assert trainer.step == steps


def test_a_stop_after_any_step_leaves_no_trace(
    backend: Backend, script: Any, tmp_path: Path
) -> None:
    """Whatever the trainer did before; dropout and layers that are dropped go on too."""
    trainer = script.Trainer(backend.create(SMALL), 1e-2, STEPS)
    losses = []
    for step in range(STEPS):
        trainer.save(tmp_path / f"state-{step}")
        losses.append(trainer.train(IDS[step], LABELS[step]))
    expected = bits(backend.canonical_weights(trainer.model))
    for stop in (7, 0, 3):
        trainer.load(tmp_path / f"state-{stop}")
        assert trainer.step == stop
        found = [trainer.train(IDS[step], LABELS[step]) for step in range(stop, STEPS)]
        assert found == losses[stop:]
        assert bits(backend.canonical_weights(trainer.model)) == expected


def gradients(trainer: Any, backend: str) -> np.ndarray:
    """Those that the optimizer has seen, or their mean over the steps."""
    if backend == "torch":
        found = [p.grad for p in trainer.model.parameters()]
    elif backend == "tf":
        found = [v for v in trainer.optimizer.variables if "_momentum" in v.path]
    else:
        import jax
        import optax

        found = jax.tree.leaves(optax.tree_utils.tree_get(trainer.moments, "mu"))
    return np.concatenate([np.asarray(x).ravel() for x in found])


def unequal_rows() -> TrainingData:
    """Eight rows of which six labels count, or few, or none, in the order of the first batch."""
    ids = np.random.default_rng(0).integers(3, 90, (8, 7))
    counts = np.zeros(8, int)
    counts[shuffled(8, 0, 0)] = [6, 6, 5, 1, 1, 1, 0, 0]
    return TrainingData(ids, np.where(np.arange(7) > 6 - counts[:, None], ids, IGNORED_LABEL))


def test_labels_are_counted_as_the_loss_does(backend: Backend) -> None:
    losses = importlib.import_module(f"opt_{backend.name}.losses")
    labels = unequal_rows().labels
    labels[0, 0] = 7  # which nothing predicts
    given = labels
    if backend.name == "torch":
        import torch

        given = torch.from_numpy(labels)
    assert int(losses.count_labels(given)) == 20


def test_measured_losses_weigh_as_many_labels_as_count(backend: Backend) -> None:
    """The held-out loss of batches is that of all rows at once."""
    model, data = backend.load(case("pre_norm").folder), unequal_rows()

    def run(ids: Any, labels: Any) -> tuple[float, Any]:
        found = backend.forward(model, input_ids=ids, labels=labels)
        return float(found["loss"]), found["logits"].argmax(-1)

    rows = TrainingData(*(array[shuffled(8, 0, 0)] for array in (data.input_ids, data.labels)))
    expected, _ = run(rows.input_ids, rows.labels)
    found = finetuning.measured(run, rows, 2)
    assert found["held_out_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_weigh_as_many_labels_as_count(
    backend: Backend, script: Any, tmp_path: Path, parts: int
) -> None:
    """In one part all, in others few, in another none: losses and gradients are the whole batch's."""
    found = []
    for number in (1, parts):
        model = backend.load(case("pre_norm").folder, dropout=0.0)
        trainer = script.Trainer(model, 1e-3, 2, parts=number)
        given = {"batch_size": 8, "seed": 0, "steps": 2, "save_every": 9, "resume": False}
        options = Namespace(**given, output=tmp_path / str(number))
        script.learn(trainer, unequal_rows(), options, dict)
        losses = [line["loss"] for line in log_of(options.output)]
        found.append((losses, gradients(trainer, backend.name)))
    (expected, whole), (losses, summed) = found
    assert losses == pytest.approx(expected, rel=1e-5) and len(losses) == 2
    assert np.linalg.norm(summed - whole) <= 1e-5 * np.linalg.norm(whole)


@pytest.fixture
def few_sums(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script with 48 problems, to be known by heart, and one layer with dropout."""
    tokenizer = OPTTokenizer.from_pretrained(TINY_SUMS)
    few = encode_problems(tokenizer, problems("train")[::333][:48])
    monkeypatch.setattr(script, "tokenizer_and_data", lambda: (tokenizer, few, few))
    changes = {"num_hidden_layers": 1, "dropout": 0.02}
    monkeypatch.setattr(script, "config", lambda size: sums.config(size).replace(**changes))


def test_the_script_learns_and_goes_on_where_it_stopped(
    script: Any, few_sums: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ["--steps", "80", "--batch-size", "24", "--save-every", "30", "--learning-rate", "0.005"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    crash(monkeypatch, 47, parts)
    script.main([*plan, "--output", str(whole)])
    measured = log_of(whole)
    assert [line["step"] for line in measured] == [*range(1, 81)]
    assert [line["step"] for line in measured if "accuracy" in line] == [30, 60, 80]
    assert measured[-1]["accuracy"] > 0.9, "a guess is right once in a hundred times"
    script.main([*plan, "--output", str(parts), "--resume"])
    assert log_of(parts) == measured
    name = "model.safetensors"
    assert (parts / name).read_bytes() == (whole / name).read_bytes()
