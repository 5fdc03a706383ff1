# SPDX-License-Identifier: Apache-2.0
"""Programs that live beside each other and compute in turns, and what is read from their times.

A worker (`benchmarks/workers/serving.py`) answers one line of JSON with another. While one of them
computes, the others wait in a read; threads that spin for a while after their work are waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

WORKERS = Path(__file__).parent / "workers"
#: How long workers are watched for work that goes on, and how much of a core is none, in seconds.
WATCH, TICK = 0.05, 0.01
#: After how long a worker that still computes is no idle one.
PATIENCE = 10.0
#: The margin between two logits, relative to the largest, that two exact computations may swap.
NEAR_TIE = 1e-5

Tokens = Sequence[Sequence[int]]


class LostError(Exception):
    """A worker that has ended, or does not stop computing; the message is its last line."""


class Worker:
    """One program, asked by lines; its own output beyond the answers goes to `log`."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "JAX_TRACEBACK_FILTERING": "off"}
        environment |= variables
        self.log = log
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self.ready = self._answer()

    def ask(self, operation: str, **request: Any) -> dict[str, Any]:
        """One request and its answer; raises LostError."""
        if self.process.stdin is not None:
            line = json.dumps({"operation": operation, **request})
            with contextlib.suppress(BrokenPipeError):  # the answer says why
                print(line, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout is not None else ""
        if not line:
            self.process.communicate()
            lines = self.log.read_text("utf-8", errors="replace").strip().splitlines()
            raise LostError(lines[-1] if lines else f"ended with {self.process.returncode}")
        return json.loads(line)

    def busy(self) -> float:
        """Seconds of processor time used so far."""
        import psutil  # who makes tables of figures needs none

        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def close(self) -> None:
        """Ends the program."""
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Program:
    """How a contestant is started: `workers/{script}.py` with arguments after the checkpoint."""

    script: str
    arguments: tuple[str, ...] = ()
    environment: str = ""  # a folder among the peers; by default the interpreter that runs this
    variables: Mapping[str, str] = field(default_factory=dict)
    sizes: tuple[str, ...] = ()  # of the checkpoints that it can load; by default any
    exact: bool = True  # what it computes must be what ours does


class Pool:
    """The workers of one checkpoint, each started when it is first needed."""

    def __init__(
        self, checkpoint: Path, programs: Mapping[str, Program], peers: Path, stack: ExitStack
    ) -> None:
        self.checkpoint, self.peers, self.stack = checkpoint, peers, stack
        self.programs = programs
        self.workers: dict[str, Worker] = {}
        self.absent: dict[str, str] = {}

    def start(self, name: str) -> bool:
        """Whether the worker of that name runs; if not, the reason is in `absent`."""
        if name not in self.workers and name not in self.absent:
            print(f"  starting {name}", file=sys.stderr, flush=True)
            try:
                self.workers[name] = self.stack.enter_context(self._worker(self.programs[name]))
            except LostError as error:
                self.lose(name, error)
        return name in self.workers

    def lose(self, name: str, reason: LostError) -> None:
        """Leaves a contestant out."""
        self.workers.pop(name, None)
        self.absent[name] = str(reason)
        print(f"  without {name}: {reason}", file=sys.stderr, flush=True)

    def _worker(self, program: Program) -> Worker:
        if program.sizes and self.checkpoint.name not in program.sizes:
            raise LostError(f"has no {self.checkpoint.name}")
        python, variables = Path(sys.executable), dict(program.variables)
        if program.environment:
            python = self.peers / program.environment / "bin" / "python"
            variables["PYTHONPATH"] = ""
        if not python.exists():
            raise LostError(f"has no environment {program.environment} among the peers")
        script = str(WORKERS / f"{program.script}.py")
        command = [str(python), script, str(self.checkpoint), *program.arguments]
        log = self.checkpoint.parent / f"{'-'.join((program.script, *program.arguments))}.log"
        return Worker(command, variables, log)


def settle(workers: Iterable[Worker]) -> None:
    """Waits until no worker computes; raises LostError for one that does not stop."""
    workers, end = list(workers), time.monotonic() + PATIENCE
    used = [worker.busy() for worker in workers]
    while True:
        time.sleep(WATCH)
        before, used = used, [worker.busy() for worker in workers]
        restless = [w for w, a, b in zip(workers, before, used, strict=True) if b - a > TICK]
        if not restless:
            return
        if time.monotonic() > end:
            raise LostError(f"{restless[0].process.args} computes while it has nothing to do.")


def race(
    workers: Mapping[str, Worker],
    rounds: int,
    beside: Iterable[Worker],
    operation: str,
    **request: Any,
) -> dict[str, list[float]]:
    """Seconds of each worker in each round; every round asks all of them in turn.

    Args:
        workers: by name.
        rounds: how often each is asked.
        beside: all that live, so that none of them computes meanwhile.
        operation, request: what each is asked.
    """
    beside = list(beside)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            settle(beside)
            seconds[name].append(worker.ask(operation, **request)["seconds"])
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times faster ours was: the median over the rounds, in each of which both ran."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class Agreement:
    """How far greedy tokens equal others."""

    same: int  # tokens before each row's first difference
    tokens: int  # of all rows
    margin: float  # largest distance of two logits, over the largest logit, that were swapped

    @property
    def is_exact(self) -> bool:
        """Whether all tokens are equal, but for what follows a near tie."""
        return self.margin <= NEAR_TIE


def agreement(expected: Tokens, found: Tokens, logits: Callable[[], np.ndarray]) -> Agreement:
    """Compares rows of tokens; `logits` [steps, B, V], what `expected` was chosen from, if need be."""
    same, margins = 0, [0.0]
    for row, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        equal = first_difference(ours, theirs)
        same += equal
        if equal < len(ours):
            scores = logits()[equal, row]
            margin = scores[ours[equal]] - scores[theirs[equal]]
            margins.append(float(margin / np.abs(scores).max()))
    return Agreement(same, sum(map(len, expected)), max(margins))


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are equal from the start; raises ValueError where the counts differ."""
    pairs = zip(ours, theirs, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours))


def logits_error(expected: np.ndarray, found: np.ndarray, steps: int) -> float:
    """Largest difference over the largest logit, of the first steps [steps, V], whose input is equal."""
    difference = np.abs(found[:steps] - expected[:steps]).max()
    return float(difference / np.abs(expected[:steps]).max())
