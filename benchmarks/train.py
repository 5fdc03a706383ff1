# SPDX-License-Identifier: Apache-2.0
"""How fast do we train on a CPU, beside transformers?

    OPT_ZOO_PEERS=FOLDER python benchmarks/train.py [--column torch]... [--rounds 5] [--json FILE]

`make bench-train` builds the peers' environments and runs it. Everyone loads the same random float32
checkpoint in a process of its own and trains it on the same tokens with the same optimizer; within a
column all run interleaved, one at a time, each on the whole machine. Before, the losses of the first
steps without dropout are compared with the peer's: who differs is not timed, and the exit status is
1. A contestant that cannot be started is named and left out.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from benchmarks.command import argument_parser, environment, write_json
from benchmarks.contest import LostError, Pool, race
from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.train_report import Entry, Race, report, weigh
from benchmarks.train_table import BATCH, COLUMNS, COMPARED_STEPS, LENGTH, SIZE, STEPS
from opt_core import OPTConfig

ROUNDS = 5


def batches(steps: int, seed: int) -> list[list[list[int]]]:
    """Random tokens [steps, B, T], none special, the same for all."""
    rng = np.random.default_rng(seed)
    return rng.integers(4, 50000, (steps, BATCH, LENGTH)).tolist()


def compare(pool: Pool) -> dict[str, Entry]:
    """The first losses of everyone, one process after another."""
    entries = {}
    for name in pool.programs:
        if pool.start(name):
            worker = pool.workers[name]
            try:
                answers = [
                    worker.ask("train", batches=[batch]) for batch in batches(COMPARED_STEPS, 0)
                ]
                entries[name] = Entry([answer["result"] for answer in answers])
            except LostError as error:
                pool.lose(name, error)
            worker.close()
    weigh(entries)
    return entries


def time_all(pool: Pool, entries: dict[str, Entry], rounds: int) -> None:
    """A first step of everyone in the pool, then the rounds."""
    for name in pool.programs:
        if pool.start(name):
            entry, worker = entries[name], pool.workers[name]
            entry.versions, entry.load = worker.ready["versions"], worker.ready["seconds"]
            try:
                entry.first = worker.ask("train", batches=batches(1, 1))["seconds"]
            except LostError as error:
                pool.lose(name, error)
    workers = pool.workers
    seconds = race(workers, rounds, workers.values(), "train", batches=batches(STEPS, 2))
    for name, times in seconds.items():
        entries[name].seconds = times
        entries[name].peak = workers[name].ask("train", batches=batches(1, 3))["peak"]


def run_column(name: str, checkpoint: Path, peers: Path, rounds: int) -> Race:
    """The comparison of losses, then the times."""
    column = COLUMNS[name]
    with ExitStack() as stack:
        pool = Pool(checkpoint, column.programs(0.0), peers, stack)
        found = Race(name, compare(pool), pool.absent)
    if "ours" not in found.entries:
        raise SystemExit(f"{name}: {found.absent}")
    programs = {
        each: program
        for each, program in column.programs(column.dropout).items()
        if each in found.entries and each not in found.differing
    }
    with ExitStack() as stack:
        pool = Pool(checkpoint, programs, peers, stack)
        time_all(pool, found.entries, rounds)
        found.absent |= pool.absent
    return found


def main() -> int:
    """Measures what the arguments ask for; returns 1 if losses differ that should not."""
    options = argument_parser(__doc__, COLUMNS, ROUNDS).parse_args()
    races = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / SIZE
        write_random_checkpoint(checkpoint, OPTConfig.preset(SIZE))
        for column in options.column or COLUMNS:
            races.append(run_column(column, checkpoint, options.peers, options.rounds))
            print(report(races[-1]), flush=True)
    if options.json:
        found = {"environment": environment(), "rounds": options.rounds}
        write_json(options.json, found | {"races": [asdict(each) for each in races]})
    return 1 if any(race.differing for race in races) else 0


if __name__ == "__main__":
    sys.exit(main())
