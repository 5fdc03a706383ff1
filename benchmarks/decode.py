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
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # runs in a source tree, installed or not

from benchmarks.contest import LostError, Worker, agreement, logits_error, race
from benchmarks.decode_report import Entry, Race, environment, plot, show
from benchmarks.decode_table import BANDWIDTH, COLUMNS, JOBS, SCALES, SIZES, Job, Program
from benchmarks.random_checkpoint import write_random_checkpoint
from opt_core import OPTConfig

ROUNDS = 5
#: How often the first contestant runs before the others start, to see whether they slow it.
ALONE = 3


def write_checkpoint(folder: Path, size: str) -> Path:
    """A random checkpoint with the tokenizer files that CTranslate2's converter wants."""
    checkpoint = folder / size
    if not (checkpoint / "tokenizer_config.json").exists():
        config = OPTConfig.preset(size)
        write_random_checkpoint(checkpoint, config, scale=SCALES[size])
        words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
        words |= {f"w{index}": index for index in range(4, config.vocab_size)}
        (checkpoint / "vocab.json").write_text(json.dumps(words))
        (checkpoint / "merges.txt").write_text("#version: 0.2\n")
        special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<pad>", **special}
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return checkpoint


class Pool:
    """The workers of one column and size, each started when it is first needed."""

    def __init__(self, checkpoint: Path, peers: Path, stack: ExitStack) -> None:
        self.checkpoint, self.peers, self.stack = checkpoint, peers, stack
        self.workers: dict[str, Worker] = {}
        self.absent: dict[str, str] = {}

    def get(self, name: str, program: Program) -> Worker | None:
        """The worker of that name; None for one that cannot be had, whose reason is in `absent`."""
        if name not in self.workers and name not in self.absent:
            try:
                worker = self._start(name, program)
            except LostError as error:
                self.absent[name] = str(error)
            else:
                self.workers[name] = self.stack.enter_context(worker)
        return self.workers.get(name)

    def _start(self, name: str, program: Program) -> Worker:
        if self.checkpoint.name not in program.sizes:
            raise LostError(f"has no {self.checkpoint.name}")
        python = Path(sys.executable)
        variables = dict(program.variables)
        if program.environment:
            python = self.peers / program.environment / "bin" / "python"
            variables["PYTHONPATH"] = ""
        if not python.exists():
            raise LostError(f"no environment {program.environment}: run `make bench-decode`")
        script = HERE / "workers" / f"{program.script}.py"
        arguments = [str(self.checkpoint), *program.arguments]
        if program is BANDWIDTH:
            arguments = []
        log = self.checkpoint.parent / f"{name}.log"
        print(f"  starting {name}", file=sys.stderr, flush=True)
        return Worker([str(python), str(script), *arguments], variables, log)


def prompts(job: Job) -> list[list[int]]:
    """The same random prompts for everyone, without special tokens."""
    rng = np.random.default_rng([job.batch, job.prompt])
    return rng.integers(4, 50000, (job.batch, job.prompt)).tolist()


def run_job(pool: Pool, size: str, column: str, name: str, rounds: int) -> Race:
    """First calls, the comparison of tokens, then the rounds."""
    job, programs = JOBS[name], COLUMNS[column]
    request = {"prompts": prompts(job), "new_tokens": job.new}
    entries: dict[str, Entry] = {}
    tokens: dict[str, list[list[int]]] = {}
    alone: list[float] = []
    for each in (each for each in job.names if each in programs):
        is_first = not pool.workers
        worker = pool.get(each, programs[each])
        if worker is None:
            continue
        try:
            prepared = worker.ask("prepare", batch=job.batch)["seconds"]
            first = worker.ask("generate", **request)
        except LostError as error:
            del pool.workers[each]
            pool.absent[each] = str(error)
            continue
        tokens[each] = first["result"]
        entries[each] = Entry(
            versions=worker.ready["versions"],
            load=worker.ready["seconds"],
            prepare=prepared,
            first=first["seconds"],
        )
        if is_first:
            alone = race({each: worker}, ALONE, [worker], **request)[each]
    if "ours" not in entries:
        raise SystemExit(f"ours in {column} cannot run: {pool.absent['ours']}")
    compare(pool, programs, job, request, tokens, entries)
    bandwidth = pool.get("bandwidth", BANDWIDTH)
    if bandwidth is None:
        raise SystemExit(f"bandwidth cannot be measured: {pool.absent['bandwidth']}")
    racing = {each: pool.workers[each] for each, entry in entries.items() if not entry.differs}
    racing["bandwidth"] = bandwidth
    seconds = race(racing, rounds, pool.workers.values(), **request)
    reads = seconds.pop("bandwidth")
    for each, times in seconds.items():
        entries[each].seconds.extend(times)
    absent = {each: why for each, why in pool.absent.items() if each in job.names}
    return Race(
        size, column, name, entries, absent, statistics.median(reads), pool.workers_alone(alone)
    )


def main() -> int:
    raise SystemExit
