# SPDX-License-Identifier: Apache-2.0
"""Do we compute the right thing on a GPU, and how fast, beside transformers and what the card can give?

    python benchmarks/gpu.py [--full] [--budget SECONDS] [--resume] [--results FOLDER] [--rounds 3]
        [--section tests]... [--size opt-2.7b]... [--framework torch]... [--length 2048]... [--batch 8]...

First the tests of `tests/gpu`, then the card itself (a plain copy, sum and matrix product), then the parts of
a plan, in order: `FIRST` of `gpu_table.py`, which tells most in a few minutes, or with --full everything.
Pure inference is the speed-ups of the reference's page: one forward pass without gradients and cache over
whole rows, or over rows of which half, at least one, are padded on the left by a quarter. Decoding is 64
tokens after 32, prefill the first token, training a step of 8 rows of 2048 tokens (AdamW, a dropout of
0.1). Weights are random and made on the card; ours and transformers' models share them, and run in turns.
What everyone computes (logits; greedy tokens and logits; loss and length of the gradient without dropout) is
compared with the first of ours before: who differs is not timed. Who is short of memory, or cannot run
here, is named with the reason.

Each part is a process of its own, and each figure is in FOLDER/gpu.json as soon as it is measured, so that
a run that is killed loses one case, and one that fails stops nothing behind it. With --budget it ends by
itself: what would not fit any more is named as such, and --resume measures that alone. The exit status is 1
if anything failed or differs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # runs in a source tree, installed or not

from benchmarks import flash_report, gpu_jobs_report, gpu_report
from benchmarks.gpu_case import EVERYONE, FAILED, LEFT_OUT, OUT_OF_TIME, Case, Results, differing
from benchmarks.gpu_device import TorchDevice, gpu_environment, measure_card
from benchmarks.gpu_race import LONGEST, Budget, Request
from benchmarks.gpu_table import FIRST, FRAMEWORKS, FULL, JOBS, Part, tiny

ROUNDS = 3
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
WORKERS = Path(__file__).parent / "workers"
#: What is not a part of a plan.
TESTS, CARD = "tests", "card"
#: JAX would take most of the card's memory at once, and tests run beside each other.
VARIABLES = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
#: Of the budget, which the tests of both frameworks have together.
TESTS_SHARE = 0.4
#: Seconds that a process has to end by itself before it is killed.
GRACE = 5.0
#: A line of pytest's about one test.
OUTCOME = re.compile(r"^tests/gpu/.*(PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)


class Tests:
    """The tests of one framework, begun; what they say stands in a file line by line."""

    def __init__(self, framework: str, folder: Path, full: bool, platforms: str) -> None:
        self.start, self.full = time.monotonic(), full
        self.log = folder / f"test_{framework}.txt"
        wanted = "gpu" if full else "gpu and not full"
        # What versions that were never tried warn of is no disagreement.
        pytest = [sys.executable, "-m", "pytest", "-v", "--color=no", "-W", "default", "-m", wanted]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*pytest, f"tests/gpu/test_{framework}.py"],
                cwd=ROOT,
                env={**os.environ, **VARIABLES, "JAX_PLATFORMS": platforms},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def finish(self, seconds: float | None) -> dict[str, Any]:
        """Waits as long; counts, also those of a run that was cut."""
        cut = False
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            cut = True
            end(self.process)
        outcomes = OUTCOME.findall(self.log.read_text("utf-8", errors="replace"))
        failed = outcomes.count("FAILED") + outcomes.count("ERROR")
        if self.process.returncode and not cut:
            failed = max(failed, 1)  # also a crash, or no tests found
        return {
            "passed": outcomes.count("PASSED"),
            "failed": failed,
            "skipped": outcomes.count("SKIPPED"),
            "seconds": time.monotonic() - self.start,
            "cut": cut,
            "full": self.full,
        }


def end(process: subprocess.Popen[Any]) -> None:
    """Asks a process to end, and ends it."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass
class Run:
    """One run of a plan."""

    options: argparse.Namespace
    device: TorchDevice
    budget: Budget
    results: Results

    def write(self) -> None:
        self.results.write(self.options.results / "gpu.json")

    def tests(self) -> bool:
        """Runs those of both frameworks at the same time; whether none failed, and a GPU ran some."""
        options, seconds = self.options, None
        if options.budget is not None:
            seconds = self.budget.left - options.budget * (1 - TESTS_SHARE)
        begun = {
            name: Tests(name, options.results, options.full, self._platforms())
            for name in options.framework
            if not (options.resume and self._passed(name))
        }
        limit = Budget(seconds)
        for name, tests in begun.items():
            self.results.tests[name] = tests.finish(None if seconds is None else limit.left)
            self.write()
        print(gpu_report.tests(self.results), flush=True)
        found = [self.results.tests[name] for name in begun]
        ran = all(each["passed"] or each["cut"] for each in found) or not self.device.is_cuda
        return ran and not any(each["failed"] for each in found)

    def _passed(self, framework: str) -> bool:
        """Whether an earlier run ended with nothing to run again."""
        found = self.results.tests.get(framework)
        return bool(
            found
            and not found["failed"]
            and not found["cut"]
            and found["full"] >= self.options.full
        )

    def card(self) -> None:
        if not (self.options.resume and self.results.card):
            self.results.card = measure_card(self.device)
            self.device.free()
            self.write()
        print(gpu_jobs_report.card(self.results), flush=True)

    def part(self, part: Part) -> Iterator[Case]:
        """Measures what is asked for of a part; adds each case to the results, and gives it."""
        for case in self._measured(part, [case for case in part.cases() if self._asked(case)]):
            if case.absent.get(EVERYONE) == OUT_OF_TIME and self.results.find(case):
                continue  # an earlier run's figures are worth more
            self.results.add(case)
            self.write()
            print(report(self.results, [case]), flush=True)
            yield case

    def _asked(self, case: Case) -> bool:
        """Whether the options ask for a case, and no earlier run that is resumed has measured it."""
        chosen = vars(self.options)
        for name in ("section", "size", "framework", "length", "batch"):
            if chosen[name] and getattr(case, name) not in chosen[name]:
                return False
        found = self.results.find(case) if self.options.resume else None
        missing = (OUT_OF_TIME, FAILED, *((LEFT_OUT,) if self.options.full else ()))
        return found is None or found.lacks(*missing)

    def _measured(self, part: Part, cases: list[Case]) -> Iterator[Case]:
        """A process measures them all; a case in which it dies is lost, and another process goes on."""
        while cases:
            done, reason = 0, OUT_OF_TIME
            if self.budget.left >= part.seconds:
                worker = self._worker(part, cases)
                while True:
                    try:
                        case = next(worker)
                    except StopIteration as stop:
                        reason = stop.value
                        break
                    done += 1
                    yield case
            lost = 1 if done else len(cases)  # who dies in the first will do so again
            for case in cases[done : done + lost]:
                case.absent = {EVERYONE: reason}
                yield case
            cases = cases[done + lost :]

    def _worker(self, part: Part, cases: list[Case]) -> Generator[Case, None, str]:
        """What a process measures; returns what ended it, if it did not measure all."""
        left = self.budget.left if math.isfinite(self.budget.left) else None
        request = Request(
            cases, part.without, self.options.rounds, part.seconds, left, self.options.device
        )
        command = [sys.executable, str(WORKERS / f"gpu_{part.framework}.py"), str(request)]
        variables = {**os.environ, **VARIABLES, "JAX_PLATFORMS": self._platforms()}
        with (
            tempfile.TemporaryFile("w+", errors="replace") as errors,
            subprocess.Popen(
                command, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process,
        ):
            late = threading.TIMEOUT_MAX if left is None else left + GRACE
            timer = threading.Timer(late, process.kill)
            timer.daemon = True
            timer.start()
            for line in process.stdout or ():
                if line.startswith("{"):
                    yield Case.from_json(json.loads(line))
            process.wait()
            timer.cancel()
            errors.seek(0)
            text = errors.read()
        print(text, file=sys.stderr, end="", flush=True)
        lines = text.strip().splitlines() or [f"ended with {process.returncode}"]
        return OUT_OF_TIME if self.budget.spent() else FAILED + lines[-1][:LONGEST]

    def _platforms(self) -> str:
        return "cuda,cpu" if self.device.is_cuda else "cpu"


def report(results: Results, cases: list[Case]) -> str:
    """Some cases of one section, and who was not timed."""
    if cases[0].section == "inference":
        return flash_report.report(cases)
    return gpu_jobs_report.report(results, cases)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    sizes = dict.fromkeys(part.size for part in FULL)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--full", action="store_true", help="everything, instead of what tells most")
    add("--budget", type=float, help="seconds after which it ends (default: when all is measured)")
    add("--resume", action="store_true", help="only what the file of figures does not have yet")
    add("--section", action="append", choices=(TESTS, CARD, *JOBS))
    add("--size", action="append", choices=[*sizes])
    add("--framework", action="append", choices=[*FRAMEWORKS])
    add("--length", action="append", type=int, help="of rows")
    add("--batch", action="append", type=int, help="number of rows")
    add("--rounds", type=int, default=ROUNDS, help="(default: %(default)s)")
    add("--device", default="cuda", help="(default: %(default)s)")
    add("--tiny", action="store_true", help="a small model and short rows: a trial of this program")
    add("--results", type=Path, default=RESULTS, help="the folder of figures, to which it adds")
    options = parser.parse_args(arguments)
    options.results = options.results.absolute()
    options.framework = options.framework or [*FRAMEWORKS]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures what the arguments ask for; returns 1 if something failed, or computes something else."""
    options = parse(arguments)
    budget, device = Budget(options.budget), TorchDevice(options.device)
    options.results.mkdir(parents=True, exist_ok=True)
    results = Results.opened(options.results / "gpu.json", gpu_environment(device))
    run, sections = Run(options, device, budget, results), options.section or (TESTS, CARD, *JOBS)
    failed = TESTS in sections and not run.tests()
    if CARD in sections:
        run.card()
    plan = FULL if options.full else FIRST
    found = [case for part in (tiny(plan) if options.tiny else plan) for case in run.part(part)]
    for each in differing(found):
        print(f"OTHER NUMBERS: {each}", file=sys.stderr)
    return int(failed or bool(differing(found)) or any(case.lacks(FAILED) for case in found))


if __name__ == "__main__":
    sys.exit(main())
