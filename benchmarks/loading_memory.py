# SPDX-License-Identifier: Apache-2.0
"""How much memory and time does `from_pretrained` take, in each framework, beyond the bare import?

    python benchmarks/loading_memory.py [--size opt-1.3b] [--framework torch]... [--json FILE]

Writes a random float32 checkpoint into a temporary directory (opt-1.3b: 5.3 GB), loads it in a fresh
process per framework (torch also with mmap=True, which leaves the weights in the file), and exits with 1
if a peak is above model + largest tensor + 100 MB.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from benchmarks.random_checkpoint import write_random_checkpoint
from opt_core import OPTConfig
from opt_core.params import param_table
from opt_zoo.backends import CausalLM, Framework
from opt_zoo.memory import peak_bytes

ALLOWANCE = 100e6
MAPPED = "torch mmap"


def write_checkpoint(size: str, directory: str) -> dict[str, int]:
    """Writes the checkpoint tensor by tensor; returns the bytes of the model and its largest tensor."""
    config = OPTConfig.preset(size)
    write_random_checkpoint(Path(directory), config)
    sizes = [4 * math.prod(param.shape) for param in param_table(config)]
    return {"model": sum(sizes), "largest": max(sizes)}


def load(framework: str, directory: str) -> dict[str, float]:
    """Peak of the import, seconds and peak of loading, and the same once every weight was touched."""
    model_class = CausalLM.model_class(Framework(framework.split()[0]))
    options = {"mmap": True} if framework == MAPPED else {}
    imported = peak_bytes()
    start = time.perf_counter()
    model = model_class.from_pretrained(directory, **options)
    loaded = time.perf_counter()
    result = {"seconds": loaded - start, "imported": imported, "untouched": peak_bytes()}
    if framework == MAPPED:
        _touch(model)
    return {**result, "touch_seconds": time.perf_counter() - loaded, "peak": peak_bytes()}


def _touch(model: Any) -> None:
    """Reads one number of every memory page of the weights, which loading has not done."""
    for parameter in model.parameters():
        parameter.detach().flatten()[::1024].sum()


LOADS = ["torch", MAPPED, "tf", "flax"]
STEPS = {"write": write_checkpoint, "load": load}


def run(step: str, *arguments: str) -> dict[str, Any]:
    """Runs one step in a process of its own; the last line of its output is the result."""
    command = [sys.executable, __file__, "--step", step, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: str, frameworks: list[str], directory: str) -> dict[str, Any]:
    """All figures in bytes and seconds."""
    found: dict[str, Any] = {"size": size, **run("write", size, directory), "frameworks": {}}
    limit = found["model"] + found["largest"] + ALLOWANCE
    for framework in frameworks:
        loaded = run("load", framework, directory)
        above = loaded["peak"] - loaded["imported"]
        found["frameworks"][framework] = {
            "import_peak": loaded["imported"],
            "seconds": loaded["seconds"],
            "untouched_above_import": loaded["untouched"] - loaded["imported"],
            "touch_seconds": loaded["touch_seconds"],
            "peak_above_import": above,
            "limit": limit,
            "within_limit": above <= limit,
        }
    return found


def show(found: dict[str, Any]) -> None:
    """Prints the figures as a table, in MB."""
    model, largest = found["model"] / 1e6, found["largest"] / 1e6
    print(f"{found['size']} in float32: model {model:.0f} MB, largest tensor {largest:.0f} MB")
    print(
        f"{'':<11}{'import':>10}{'load':>9}{'untouched':>12}{'touch':>9}{'peak':>11}{'limit':>11}"
    )
    for name, f in found["frameworks"].items():
        print(
            f"{name:<11}{f['import_peak'] / 1e6:>7.0f} MB{f['seconds']:>7.2f} s"
            f"{f['untouched_above_import'] / 1e6:>9.0f} MB{f['touch_seconds']:>7.2f} s"
            f"{f['peak_above_import'] / 1e6:>8.0f} MB{f['limit'] / 1e6:>8.0f} MB"
            + ("" if f["within_limit"] else "  ABOVE THE LIMIT")
        )


def main() -> int:
    """Measures what the arguments ask for; returns 1 if a peak is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--size", default="opt-1.3b", help="a published size (default: %(default)s)"
    )
    parser.add_argument("--framework", action="append", choices=LOADS)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--directory", help="where to make the temporary directory")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        name, *arguments = options.step
        print(json.dumps(STEPS[name](*arguments)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        found = measure(options.size, options.framework or LOADS, directory)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(f["within_limit"] for f in found["frameworks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
