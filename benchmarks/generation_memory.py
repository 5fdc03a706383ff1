# SPDX-License-Identifier: Apache-2.0
"""How much memory does generating take, in each framework, beyond the bare import?

    python benchmarks/generation_memory.py [--size opt-350m] [--framework torch]... [--json FILE]

Writes a random float32 checkpoint into a temporary directory (opt-350m: 1.3 GB), and in a fresh process
per framework and batch loads it, with and without `prepare_for_decoding`, and generates 64 tokens
after prompts of 32. Exits with 1 if a peak is above 1.15 (weights + cache) + 150 MB.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from benchmarks.random_checkpoint import write_random_checkpoint
from opt_core import OPTConfig
from opt_core.params import param_table
from opt_zoo.backends import CausalLM, Framework
from opt_zoo.memory import peak_bytes

PROMPT, NEW = 32, 64
BATCHES = (1, 8)
FACTOR, ALLOWANCE = 1.15, 150e6


def generate(directory: str, framework: str, batch: int, prepared: bool) -> dict[str, int]:
    """The peaks after the import and after generating."""
    CausalLM.model_class(Framework(framework))
    imported = peak_bytes()
    model = CausalLM.load(Framework(framework), directory, None)
    if prepared:
        model.model.prepare_for_decoding()
    ids = [[5 + column for column in range(PROMPT)]] * batch
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    found = model.generate({"input_ids": ids, "attention_mask": [[1] * PROMPT] * batch}, options)
    if found.shape != (batch, PROMPT + NEW):
        raise SystemExit(f"expected {(batch, PROMPT + NEW)} tokens, found {found.shape}")
    return {"imported": imported, "peak": peak_bytes()}


def limit(config: OPTConfig, batch: int) -> float:
    """What generating may take: the weights once, the cache, and some room."""
    weights = 4 * sum(math.prod(param.shape) for param in param_table(config))
    columns = PROMPT + NEW
    cache = 2 * 4 * config.num_hidden_layers * batch * columns * config.hidden_size
    return FACTOR * (weights + cache) + ALLOWANCE


def run(**arguments: Any) -> dict[str, int]:
    """Generates in a process of its own; the last line of its output is the result."""
    command = [sys.executable, __file__, "--step", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: str, frameworks: list[str], directory: str) -> list[dict[str, Any]]:
    """One entry for each framework, batch and layout of the weights, in bytes."""
    config = OPTConfig.preset(size)
    write_random_checkpoint(Path(directory), config)
    found = []
    for framework in frameworks:
        for batch in BATCHES:
            for prepared in (False, True):
                case = {"framework": framework, "batch": batch, "prepared": prepared}
                peaks = run(directory=directory, **case)
                above, allowed = peaks["peak"] - peaks["imported"], limit(config, batch)
                found.append(case | {"peak": above, "limit": allowed, "within": above <= allowed})
                print(
                    f"{framework:<6} batch {batch} {'prepared' if prepared else 'as loaded':<10}"
                    f"{above / 1e6:>8.0f} MB of {allowed / 1e6:.0f} MB"
                    + ("" if above <= allowed else "  ABOVE THE LIMIT"),
                    flush=True,
                )
    return found


def main() -> int:
    """Measures what the arguments ask for; returns 1 if a peak is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--size", default="opt-350m", help="a published size (default: %(default)s)"
    )
    parser.add_argument("--framework", action="append", choices=[*Framework])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(generate(**json.loads(options.step))))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        found = measure(options.size, options.framework or [*Framework], directory)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(case["within"] for case in found) else 1


if __name__ == "__main__":
    sys.exit(main())
