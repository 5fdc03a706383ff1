# SPDX-License-Identifier: Apache-2.0
"""How fast do we decode and train on a GPU, beside transformers and beside what the card can give?

    python benchmarks/gpu.py [--section decode]... [--size opt-2.7b]... [--framework torch]...
        [--rounds 5] [--json FILE]

Random bfloat16 weights, made on the card. First the card itself: a plain copy, a plain sum and a plain
matrix product. Then decoding (64 tokens after 32), the first token after 512 and 2047 tokens, and a
training step of 8 rows of 2048 tokens (AdamW, a dropout of 0.1). In PyTorch ours and transformers run in
one process on the same weights, in turns; JAX has a process of its own. What everyone computes (greedy
tokens and logits; loss and length of the gradient without dropout) is compared with the first of ours
before: who differs is not timed, and the exit status is 1. Who is short of memory, or cannot run here, is
named with the reason. `--json` adds to what is in the file, so that a run can be split by section, size
and framework.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from benchmarks.gpu_case import Case, Results, differing
from benchmarks.gpu_device import TorchDevice, gpu_environment, measure_card
from benchmarks.gpu_jobs import DTYPE, RUNNERS
from benchmarks.gpu_jobs_report import card, report
from benchmarks.gpu_report import FRAMEWORKS
from benchmarks.gpu_table import JOBS, TINY_JOBS, Job

ROUNDS = 5
WORKER = Path(__file__).parent / "workers" / "gpu_flax.py"
#: JAX would take most of the card's memory at once.
VARIABLES = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def run_torch(case: Case, job: Job, device: TorchDevice, rounds: int) -> Case:
    """The case, filled in this process."""
    RUNNERS[case.section](case, job, device, rounds)
    return case


def run_flax(case: Case, job: Job, device: TorchDevice, rounds: int) -> Case:
    """The case, filled in a process of its own; "ours" is absent where that fails."""
    request = {"case": asdict(case), "job": asdict(job), "rounds": rounds}
    platform = "cuda,cpu" if device.is_cuda else "cpu"
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(request)],
        env={**os.environ, **VARIABLES, "JAX_PLATFORMS": platform},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stderr.strip().splitlines()
    if done.returncode:
        case.absent["ours"] = lines[-1] if lines else f"ended with {done.returncode}"
        print(done.stderr, file=sys.stderr)
        return case
    return Case.from_json(json.loads(done.stdout.splitlines()[-1]))


RUN: dict[str, Callable[[Case, Job, TorchDevice, int], Case]] = {
    "torch": run_torch,
    "flax": run_flax,
}


def measure(options: argparse.Namespace, results: Results, device: TorchDevice) -> list[Case]:
    """Adds all cases that were asked for; returns them."""
    found = []
    for section in [section for section in options.section if section in JOBS]:
        job = (TINY_JOBS if options.tiny else JOBS)[section]
        for size in [size for size in job.sizes if not options.size or size in options.size]:
            for length in job.lengths:
                for framework in options.framework:
                    device.free()
                    case = Case(section, size, job.batch, length, framework=framework)
                    case = RUN[framework](case, job, device, options.rounds)
                    results.add(case)
                    results.write(options.json)
                    print(report(results, [case]), flush=True)
                    found.append(case)
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    sections = ("card", *JOBS)
    sizes = dict.fromkeys(size for job in JOBS.values() for size in job.sizes)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--section", action="append", choices=sections)
    add("--size", action="append", choices=[*sizes])
    add("--framework", action="append", choices=[*FRAMEWORKS])
    add("--rounds", type=int, default=ROUNDS, help="(default: %(default)s)")
    add("--device", default="cuda", help="(default: %(default)s)")
    add("--tiny", action="store_true", help="a small model and short rows: a trial of this program")
    add("--json", type=Path, help="where to write the figures, to those that are there")
    options = parser.parse_args(arguments)
    options.section = options.section or sections
    options.framework = options.framework or [*FRAMEWORKS]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures what the arguments ask for; returns 1 if someone computes something else."""
    options = parse(arguments)
    device = TorchDevice(options.device)
    results = Results.opened(options.json, {**gpu_environment(device), "dtype": DTYPE})
    if "card" in options.section:
        results.card = measure_card(device)
        results.write(options.json)
        print(card(results), flush=True)
    found = measure(options, results, device)
    for each in differing(found):
        print(f"OTHER NUMBERS: {each}", file=sys.stderr)
    return 1 if differing(found) else 0


if __name__ == "__main__":
    sys.exit(main())
