# SPDX-License-Identifier: Apache-2.0
"""What the examples that train share, whatever the framework: arguments, the order of rows, the log."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opt_core.files import atomic_write
from opt_core.inputs import IGNORED_LABEL

Array = NDArray[Any]

Measure = Callable[[], dict[str, float]]  # of a model on what is held out

LARGEST_NORM = 1.0  # of all gradients together


class Rows(Protocol):
    """What a causal language model learns from: arrays [rows, T], labels not shifted."""

    input_ids: Array
    labels: Array


class Trainer(Protocol):
    """A model in training; `step` counts the steps made."""

    step: int

    def train(self, input_ids: Array, labels: Array) -> float:
        """One step on arrays [B, T]; the loss before it."""
        ...

    def save(self, path: Path) -> None:
        """Writes all that the next step depends on."""
        ...

    def load(self, path: Path) -> None:
        """Goes on where `save` was called."""
        ...


def argument_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The arguments that every training takes, with the defaults of this one."""
    parser = argparse.ArgumentParser(
        description=(description or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="folder of the result, and of the state")
    parser.add_argument("--steps", type=int, help="how many batches to learn from in all")
    parser.add_argument("--batch-size", type=int, help="rows of a batch")
    parser.add_argument("--learning-rate", type=float, help="at its peak")
    parser.add_argument("--seed", type=int, default=0, help="of values, dropout and order")
    parser.add_argument("--save-every", type=int, default=500, help="steps between saved states")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output")
    parser.set_defaults(**defaults)
    return parser


def warmup(steps: int) -> int:
    """For how many steps the rate rises from zero; then it falls back along half a cosine."""
    if steps < 2:
        raise SystemExit(f"--steps {steps}: it takes one to warm up, and another to learn")
    return max(1, steps // 20)


def order(rows: int, batch_size: int, seed: int, start: int = 0) -> Iterator[Array]:
    """The rows of each step's batch without end, from step `start` on: each time through in another order.

    It depends on nothing but the arguments, so that a training that is resumed sees what it would have.
    """
    batches = rows // batch_size
    if not batches:
        raise SystemExit(f"--batch-size {batch_size}: there are only {rows} rows to learn from")

    def batch(step: int) -> Array:
        epoch, place = divmod(step, batches)
        return shuffled(rows, seed, epoch)[place * batch_size :][:batch_size]

    return map(batch, count(start))


@lru_cache(1)
def shuffled(rows: int, seed: int, epoch: int) -> Array:
    """All rows, in the order of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def parts_of(parts: int, input_ids: Array, labels: Array) -> Iterator[tuple[Array, Array, float]]:
    """The rows of a batch [B, T] in parts of one size, and the share of the loss that each has.

    That is its share of the labels that count: a mean of the parts' means would be another loss, with
    other gradients. In a part without any, one counts, with a share of 0.

    Args:
        labels: [B, T], of which a row's first is predicted nowhere, or [B] classes, all of which count.
    """
    predicted = labels[:, 1:] if labels.ndim == 2 else labels
    counts = [(part != IGNORED_LABEL).sum() for part in np.split(predicted, parts)]
    total = max(1, sum(counts))
    for ids, targets, own in zip(
        np.split(input_ids, parts), np.split(labels, parts), counts, strict=True
    ):
        if not own:
            targets = targets.copy()
            targets[0, 1] = ids[0, 1]
        yield ids, targets, float(own / total)


def right_rows(chosen: Array, labels: Array) -> int:
    """How many rows are answered in full, if each token is the most likely after the right ones before.

    The right answer is fed to the model, so all tokens are right exactly if greedy decoding's are.

    Args:
        chosen: [B, T], the most likely next token after each.
        labels: [B, T], not shifted, `IGNORED_LABEL` where anything will do.
    """
    matters = labels[:, 1:] != IGNORED_LABEL
    return int(((chosen[:, :-1] == labels[:, 1:]) | ~matters).all(1).sum())


class Log:
    """What was measured at each step: in `log.jsonl` of a folder, and some of it on the screen."""

    def __init__(self, folder: Path, start: int = 0, every: int = 50) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.every, self.began = folder / "log.jsonl", every, time.perf_counter()
        lines = self.path.read_text().splitlines() if start else []
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        atomic_write(self.path, "".join(f"{line}\n" for line in kept))

    def add(self, step: int, **values: float) -> None:
        """Notes the values of a step, and shows them now and then, or where there is more than a loss."""
        seconds = round(time.perf_counter() - self.began, 2)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")
        if step % self.every == 0 or len(values) > 1:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            print(f"step {step}: {shown} ({seconds:.0f} s)", flush=True)


class Progress:
    """Where a training stands: goes on from its saved state if told to; notes each step.

    Now and then it saves the state and measures.
    """

    def __init__(self, trainer: Trainer, options: argparse.Namespace, measure: Measure) -> None:
        self.trainer, self.options, self.measure = trainer, options, measure
        self.state = options.output / "state"
        if options.resume:
            trainer.load(self.state)
        self.log = Log(options.output, trainer.step)

    def note(self, loss: float) -> None:
        """Called after each step, with the loss before it."""
        step, values = self.trainer.step, {"loss": loss}
        if step % self.options.save_every == 0 or step == self.options.steps:
            self.trainer.save(self.state)
            values |= self.measure()
        self.log.add(step, **values)


def learn(trainer: Trainer, data: Rows, options: argparse.Namespace, measure: Measure) -> None:
    """Makes the steps that are left."""
    progress = Progress(trainer, options, measure)
    batches = order(len(data.labels), options.batch_size, options.seed, trainer.step)
    while trainer.step < options.steps:
        rows = next(batches)
        progress.note(trainer.train(data.input_ids[rows], data.labels[rows]))
