# SPDX-License-Identifier: Apache-2.0
"""How fast do we decode on a CPU, beside the peers and beside what memory can give?

    OPT_ZOO_PEERS=FOLDER python benchmarks/decode.py [--size opt-125m]... [--column torch]...
        [--job decode-1]... [--rounds 5] [--json FILE] [--plot FILE]

`make bench-decode` builds the peers' environments and runs it. Everyone loads the same random float32
checkpoint in a process of its own and waits there for its turn, so that all of one framework's column
run interleaved, one at a time, each on the whole machine. Tokens are compared before the clock
matters: an exact contestant whose tokens differ by more than a near tie is not timed, and the exit
status is 1. A contestant that cannot be started is named and left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from benchmarks.command import argument_parser, environment, write_json
from benchmarks.contest import Pool
from benchmarks.decode_race import idle_cost, run_job
from benchmarks.decode_report import Race, report, write_plot
from benchmarks.decode_table import BANDWIDTH, COLUMNS, JOBS, SCALES, SIZES
from benchmarks.random_checkpoint import write_random_checkpoint
from opt_core import OPTConfig

ROUNDS = 5


def write_checkpoint(folder: Path, size: str) -> Path:
    """A random checkpoint with the tokenizer files that CTranslate2's converter wants."""
    checkpoint = folder / size
    last = checkpoint / "tokenizer_config.json"
    if not last.exists():
        config = OPTConfig.preset(size)
        write_random_checkpoint(checkpoint, config, scale=SCALES[size])
        words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
        words |= {f"w{index}": index for index in range(4, config.vocab_size)}
        (checkpoint / "vocab.json").write_text(json.dumps(words))
        (checkpoint / "merges.txt").write_text("#version: 0.2\n")
        special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<pad>", **special}
        last.write_text(json.dumps(tokenizer))
    return checkpoint


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All races, as the JSON file holds them."""
    races: list[Race] = []
    beside: dict[str, float] = {}
    for size in options.size or SIZES:
        checkpoint = write_checkpoint(folder, size)
        for column in options.column or COLUMNS:
            with ExitStack() as stack:
                programs = {**COLUMNS[column], "bandwidth": BANDWIDTH}
                pool = Pool(checkpoint, programs, options.peers, stack)
                for job in options.job or JOBS:
                    races.append(run_job(pool, column, job, options.rounds))
                    print(report(races[-1:]), flush=True)
                beside[f"{size} {column}"] = idle_cost(pool)
                print(
                    f"ours beside idle workers: {beside[f'{size} {column}']:.2f}x its time alone\n"
                )
    found = {"environment": environment(), "rounds": options.rounds, "beside": beside}
    return found | {"races": [asdict(each) for each in races]}


def main() -> int:
    """Measures what the arguments ask for; returns 1 if tokens differ that should not."""
    parser = argument_parser(__doc__, COLUMNS, ROUNDS)
    parser.add_argument("--size", action="append", choices=SIZES)
    parser.add_argument("--job", action="append", choices=[*JOBS])
    parser.add_argument("--checkpoints", type=Path, help="a folder to keep the checkpoints in")
    parser.add_argument("--plot", type=Path, help="where to draw them (.svg or .png)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.checkpoints or Path(temporary)).absolute()
        found = measure(options, folder)
    if options.json:
        write_json(options.json, found)
    if options.plot:
        write_plot(found, options.plot)
    return 1 if any(race["differing"] for race in found["races"]) else 0


if __name__ == "__main__":
    sys.exit(main())
