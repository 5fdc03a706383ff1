# SPDX-License-Identifier: Apache-2.0
"""All tests in parts, each in a process of its own; `make test` runs it.

Three frameworks in one process fight over threads and memory, so the suite runs once per backend. A
part that finds no tests, or a backend that cannot be imported, is a failure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
BACKENDS = ("torch", "tf", "flax")
NEUTRAL = ("core", "reference", "architecture", "conversion", "cli", "docs")
#: Two threads each, as on the smallest machine; TensorFlow's messages would hide the tests' own.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "2",
    "TF_NUM_INTRAOP_THREADS": "2",
    "TF_NUM_INTEROP_THREADS": "2",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


@dataclass(frozen=True)
class Result:
    """What came of one part."""

    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float


def parts(slow: bool) -> dict[str, list[str]]:
    """The commands by name, in order: lint and types, the neutral tests, each backend."""
    python = [sys.executable, "-m"]
    pytest = [
        *python,
        "pytest",
        "-q",
        "-m",
        "slow" if slow else "not (hub or gpu or oracle or slow)",
    ]
    commands = {}
    if not slow:
        commands = {
            "ruff": [*python, "ruff", "check", "."],
            "format": [*python, "ruff", "format", "--check", "."],
            "mypy": [*python, "mypy"],
        }
    commands["neutral"] = [*pytest, *_present(NEUTRAL)]
    for backend in BACKENDS:
        commands[backend] = [*pytest, "--backend", backend, *_present(("suite", backend))]
    return commands


def _present(names: tuple[str, ...]) -> list[str]:
    return [f"tests/{name}" for name in names if (ROOT / "tests" / name).is_dir()]


def run(name: str, command: list[str]) -> Result:
    """Runs one part and counts; a tool other than pytest counts as one test."""
    print(f"\n=== {name}: {' '.join(command[1:])}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        if "pytest" in command:
            command = [*command, f"--junitxml={report}"]
        code = subprocess.run(
            command, cwd=ROOT, env={**ENVIRONMENT, **os.environ}, check=False
        ).returncode
        passed, failed, skipped = _counts(report) if report.exists() else (int(code == 0), 0, 0)
    if code and not failed:
        failed = 1  # a crash, no tests found, or a tool's complaint
    return Result(name, passed, failed, skipped, time.monotonic() - start)


def _counts(report: Path) -> tuple[int, int, int]:
    suite = next(ElementTree.parse(report).iter("testsuite"))
    total, failures, errors, skipped = (
        int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")
    )
    return total - failures - errors - skipped, failures + errors, skipped


def main() -> int:
    """Runs the parts named, or all; prints a summary; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts to run (default: all)")
    parser.add_argument("--slow", action="store_true", help="only tests of more than a minute")
    options = parser.parse_args()
    commands = parts(options.slow)
    if unknown := set(options.names) - set(commands):
        parser.error(f"no part {sorted(unknown)}: expected some of {', '.join(commands)}")
    results = [run(name, commands[name]) for name in options.names or commands]

    print(f"\n{'part':<10}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
    for r in results:
        print(f"{r.name:<10}{r.passed:>8}{r.failed:>8}{r.skipped:>8}{r.seconds:>9.0f}")
    passed, failed = sum(r.passed for r in results), sum(r.failed for r in results)
    seconds = sum(r.seconds for r in results)
    print(f"\n{passed} passed, {failed} failed in {seconds:.0f}s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
