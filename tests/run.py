# SPDX-License-Identifier: Apache-2.0
"""All tests in parts, each in a process of its own, two at a time; `make test` runs it.

Three frameworks in one process fight over threads and memory, so the suite runs once per backend, and
thrice for those that compile: decoding and training by themselves. A part that finds no tests, or a backend
that cannot be imported, is a failure. What a part prints is shown when it has ended.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
BACKENDS = ("torch", "tf", "flax")
COMPILING = ("tf", "flax")
LONGEST_FIRST = (
    "neutral",
    "torch",
    "tf-rest",
    "flax-rest",
    "flax",
    "tf-decoding",
    "flax-decoding",
    "flax-training",
    "tf",
    "tf-training",
    "mypy",
    "ruff",
    "format",
)
NEUTRAL = (
    "core",
    "reference",
    "architecture",
    "conversion",
    "cli",
    "docs",
    "faults",
    "fuzz",
)
#: Files of tests/suite that wait for programs to be compiled: loops, and what concerns training.
DECODING = (
    "assisted",
    "constrained",
    "contrastive",
    "decoding_example",
    "dola",
    "generate",
    "generate_edges",
    "sampling",
    "strategies",
)
#: Those that must run as users' programs do; what is in none of the three is the rest.
EXACT = ("activations", "golden", "gradients", "loops", "numerics", "processors")
TRAINING = ("checkpointing", "dropout", "heads", "finetuning", "packing", "resizing", "training")
#: Those whose cases are one program each, apart: of each function that XLA has compiled once, TensorFlow
#: keeps some 20 MB for the life of the process.
ROW_BY_ROW = "tests/suite/test_strategies.py::test_each_row_alone"
PROGRAMS = (
    ("tests/suite/test_generate.py", "tests/suite/test_sampling.py"),
    ("tests/suite/test_strategies.py", f"--deselect={ROW_BY_ROW}"),
    (ROW_BY_ROW,),
)
#: One thread each, since two parts share the two cores of the smallest machine: OpenMP's threads spin, and
#: PyTorch's tests take twice as long with two. TensorFlow's messages would hide the tests' own.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
#: XLA's own passes all run, but its older emitters write the code, in one piece, and LLVM optimises
#: little: half the time to compile. What computes logits, gradients, processors and the loops by
#: themselves is tested as users run it.
QUICKLY_COMPILED = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
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
    """The commands by name, in order: lint and types, the neutral tests, each backend.

    What is slow are some neutral tests, and one program for each case of decoding.
    """
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-q", "-m"]
    neutral = [f"tests/{name}" for name in NEUTRAL]
    waiting = {
        "": [f"tests/suite/test_{name}.py" for name in EXACT],
        "decoding": [f"tests/suite/test_{name}.py" for name in DECODING],
        "training": [f"tests/suite/test_{name}.py" for name in TRAINING],
    }
    if slow:
        every = [*python, "pytest", "-q", "--all-programs", "--backend"]
        programs = {
            f"{backend}-{number}-decoding": [*every, backend, *tests]
            for backend in COMPILING
            for number, tests in enumerate(PROGRAMS)
        }
        longest = {
            f"{backend}-slow": [
                *pytest,
                "slow",
                "--backend",
                backend,
                "tests/suite",
                f"tests/{backend}",
            ]
            for backend in BACKENDS
        }
        return {"neutral": [*pytest, "slow", *neutral], **longest, **programs}
    pytest.append("not (flash or gpu or hub or oracle or slow)")
    commands = {
        "ruff": [*python, "ruff", "check", "."],
        "format": [*python, "ruff", "format", "--check", "."],
        "mypy": [*python, "mypy"],
        "neutral": [*pytest, *neutral],
    }
    for backend in BACKENDS:
        tests = [*pytest, "--backend", backend]
        commands[backend] = [*tests, "tests/suite", f"tests/{backend}"]
        if backend in COMPILING:
            commands[f"{backend}-rest"] = commands[backend]
            commands[backend] = [*tests, *waiting[""]]
            for what, paths in waiting.items():
                commands[f"{backend}-rest"] += [f"--ignore={path}" for path in paths]
                if what:
                    commands[f"{backend}-{what}"] = [*tests, *paths]
    return commands


def run(name: str, command: list[str]) -> Result:
    """Runs one part and counts; a tool other than pytest counts as one test."""
    start = time.monotonic()
    quickly = name.endswith(("-decoding", "-training", "-rest"))
    environment = {**ENVIRONMENT, **(QUICKLY_COMPILED if quickly else {})}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        if "pytest" in command:
            command = [*command, f"--junitxml={report}"]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**environment, **os.environ},
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        code = done.returncode
        print(f"\n=== {name}: {' '.join(command[1:])}\n{done.stdout}", flush=True)
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
    parser.add_argument("--jobs", type=int, default=2, help="parts at a time (default: 2)")
    options = parser.parse_args()
    commands = parts(options.slow)
    if unknown := set(options.names) - set(commands):
        parser.error(f"no part {sorted(unknown)}: expected some of {', '.join(commands)}")
    names = sorted(options.names or commands, key=(*LONGEST_FIRST, *commands).index)
    start = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda name: run(name, commands[name]), names))

    print(f"\n{'part':<14}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
    for r in results:
        print(f"{r.name:<14}{r.passed:>8}{r.failed:>8}{r.skipped:>8}{r.seconds:>9.0f}")
    passed, failed = sum(r.passed for r in results), sum(r.failed for r in results)
    print(f"\n{passed} passed, {failed} failed in {time.monotonic() - start:.0f}s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
