# SPDX-License-Identifier: Apache-2.0
"""The long fuzzing run over every reader: `python -m tests.fuzz.run --inputs 200000 --jobs 3`.

Worker processes make inputs, read them within the limits and count what comes of them. Anything but
a result or one of our errors is a finding: its files, its traceback and the numbers that make it
anew are saved. A worker that dies or hangs is a finding too, and another takes its place. Prints a
summary in JSON; the exit code is 1 if there are findings.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

from tests.fuzz.inputs import Input, draw, placed, scratch
from tests.fuzz.limits import MEGABYTES, SECONDS, TooSlowError
from tests.fuzz.targets import READ, TARGETS, examine

ERRORS = ("FormatError", "CheckpointError", "ConfigError", "InputError", "UnsupportedError")
FINDING = "FINDING"
OUTCOMES = (READ, *ERRORS, FINDING)
HANG = 60.0
"""Seconds after which a worker that came no further is stopped."""

_CHECK_EVERY = 1000
_SPARE_FILES = 20


@dataclass(frozen=True)
class Plan:
    """What is to be done, as each worker knows it."""

    run: int
    inputs: int
    jobs: int
    readers: tuple[str, ...]
    findings: Path
    folder: Path


@dataclass
class Worker:
    """A process that does every `jobs`-th input, and what it reports through shared memory."""

    plan: Plan
    first: int
    counts: Any = field(init=False)
    state: Any = field(init=False)  # the number in work, peak kilobytes at the start and now
    process: BaseProcess = field(init=False)
    seen: tuple[int, float] = (-1, 0.0)

    def __post_init__(self) -> None:
        self.counts = RawArray("q", len(self.plan.readers) * len(OUTCOMES))
        self.state = RawArray("q", [self.first, 0, 0])
        self.start()

    def start(self) -> None:
        """Begin, or go on, with the input whose number stands in the state."""
        self.process = multiprocessing.get_context("spawn").Process(
            target=work, args=(self.plan, self.counts, self.state), daemon=True
        )
        self.process.start()
        self.seen = (-1, time.monotonic())

    def watch(self) -> bool:
        """Start a worker anew that died or hangs; tells whether it is still at work."""
        if self.process.is_alive():
            if self.state[0] != self.seen[0]:
                self.seen = (self.state[0], time.monotonic())
            if time.monotonic() - self.seen[1] < HANG:
                return True
            self.process.kill()
            self.process.join()
        if self.process.exitcode == 0:
            return False
        number = self.state[0]
        made = draw(self.plan.run, number, self.plan.readers)
        save(self.plan, made, f"the worker ended with {self.process.exitcode}\n")
        count(self.plan, self.counts, made.seed.reader, FINDING)
        self.state[0] += self.plan.jobs
        self.start()
        return True


def work(plan: Plan, counts: Any, state: Any) -> None:
    """Do every `jobs`-th input from the one in the state on."""
    state[1] = state[1] or _peak()
    files, parent = _open_files(), os.getppid()
    for number in range(state[0], plan.inputs, plan.jobs):
        state[0], state[2] = number, _peak()
        made = draw(plan.run, number, plan.readers)
        count(plan, counts, made.seed.reader, attempt(plan, made))
        if number % _CHECK_EVERY < plan.jobs:
            gc.collect()
            if _open_files() > files + _SPARE_FILES:
                raise RuntimeError("files are left open")
            if os.getppid() != parent:
                return  # the run was stopped


def attempt(plan: Plan, made: Input) -> str:
    """Read one input; returns the outcome, and saves it if it is a finding."""
    try:
        with placed(plan.folder / str(os.getpid()), made.seed, made.files) as path:
            return examine(made.seed.reader, path)
    except (Exception, TooSlowError):  # noqa: BLE001 - whatever it is, it is what we look for
        save(plan, made, traceback.format_exc())
        return FINDING


def count(plan: Plan, counts: Any, reader: str, outcome: str) -> None:
    counts[plan.readers.index(reader) * len(OUTCOMES) + OUTCOMES.index(outcome)] += 1


def save(plan: Plan, made: Input, story: str) -> None:
    """Save what made a finding and what came of it."""
    folder = plan.findings / f"{made.seed.reader}-{plan.run}-{made.number}"
    for name, data in made.files.items():
        (folder / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / name).write_bytes(data)
    again = f"--seed {plan.run} --only {made.number} --readers {' '.join(plan.readers)}"
    title = f"{made.seed.name}, opened at {made.seed.entry or 'the folder'}\n{again}\n\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "story.txt").write_text(title + story, encoding="utf-8", errors="replace")


def summary(plan: Plan, workers: Sequence[Worker], seconds: float) -> dict[str, Any]:
    """What came of a run, for the record."""
    outcomes: dict[str, dict[str, int]] = {}
    for row, reader in enumerate(plan.readers):
        totals: Counter[str] = Counter()
        for worker in workers:
            for column, outcome in enumerate(OUTCOMES):
                totals[outcome] += worker.counts[row * len(OUTCOMES) + column]
        outcomes[reader] = {outcome: number for outcome, number in totals.items() if number}
    total = sum(sum(row.values()) for row in outcomes.values())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}",
        "seed": plan.run,
        "jobs": plan.jobs,
        "limits": {"seconds": SECONDS, "megabytes": MEGABYTES},
        "inputs": total,
        "findings": sum(row.get(FINDING, 0) for row in outcomes.values()),
        "seconds": round(seconds),
        "inputs_per_second": round(total / seconds),
        "peak_growth_mb": max((w.state[2] - w.state[1]) // 1024 for w in workers),
        "outcomes": outcomes,
    }


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    """Run and print the summary; returns 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--seed", type=int, default=1, help="another gives other inputs")
    parser.add_argument("--readers", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", type=int, help="the number of one input, to see what it does")
    parser.add_argument("--findings", type=Path, default=Path(".cache/fuzz"))
    options = parser.parse_args()
    readers = tuple(options.readers)
    with scratch() as folder:
        if options.only is not None:
            made = draw(options.seed, options.only, readers)
            with placed(folder, made.seed, made.files) as path:
                print(made.seed.name, examine(made.seed.reader, path))
            return 0
        plan = Plan(options.seed, options.inputs, options.jobs, readers, options.findings, folder)
        start = time.monotonic()
        workers = [Worker(plan, first) for first in range(plan.jobs)]
        while sum(worker.watch() for worker in workers):
            time.sleep(0.2)
        result = summary(plan, workers, time.monotonic() - start)
    print(json.dumps(result, indent=1))
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
