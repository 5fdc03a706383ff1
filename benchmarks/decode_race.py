# SPDX-License-Identifier: Apache-2.0
"""One race of `benchmarks/decode.py`: the workers of a column, their tokens compared, then their times."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from benchmarks.contest import LostError, Pool, agreement, logits_error, race
from benchmarks.decode_report import Entry, Race
from benchmarks.decode_table import ARRAY, JOBS, Job

#: How often ours runs beside the others and alone, to see what waiting workers cost.
IDLE_ROUNDS = 3


def task(job: Job) -> dict[str, Any]:
    """What everyone is asked: random prompts without special tokens, the same for all."""
    rng = np.random.default_rng([job.batch, job.prompt])
    prompts = rng.integers(4, 50000, (job.batch, job.prompt)).tolist()
    return {"prompts": prompts, "new_tokens": job.new}


def run_job(pool: Pool, column: str, name: str, rounds: int) -> Race:
    """First calls, the comparison of tokens, then the rounds."""
    job = JOBS[name]
    request = task(job)
    names = [each for each in job.names if each in pool.programs]
    entries, tokens = {}, {}
    for each in names:
        first = first_call(pool, each, job, request)
        if first is not None:
            entries[each], tokens[each] = first
    if "ours" not in entries or not pool.start("bandwidth"):
        raise SystemExit(f"{column}: {pool.absent}")
    compare(pool, job, request, tokens, entries)
    differing = [each for each, entry in entries.items() if entry.differs]
    racing = [*(each for each in entries if each not in differing), "bandwidth"]
    workers = {each: pool.workers[each] for each in racing}
    seconds = race(workers, rounds, pool.workers.values(), "generate", **request)
    reading = min(seconds.pop("bandwidth"))
    for each, times in seconds.items():
        entries[each].seconds = times
    absent = {each: why for each, why in pool.absent.items() if each in names}
    size = pool.checkpoint.name
    return Race(size, column, name, entries, differing, absent, ARRAY / reading)


def first_call(
    pool: Pool, name: str, job: Job, request: Mapping[str, Any]
) -> tuple[Entry, list[list[int]]] | None:
    """Starts a contestant if need be and lets it run once; None where it cannot."""
    if not pool.start(name):
        return None
    worker = pool.workers[name]
    try:
        prepared = worker.ask("prepare", batch=job.batch)
        first = worker.ask("generate", **request)
    except LostError as error:
        pool.lose(name, error)
        return None
    ready = worker.ready
    entry = Entry(ready["versions"], ready["seconds"], prepared["seconds"], first["seconds"])
    return entry, first["result"]


def compare(
    pool: Pool,
    job: Job,
    request: Mapping[str, Any],
    tokens: Mapping[str, list[list[int]]],
    entries: Mapping[str, Entry],
) -> None:
    """Notes how far everyone's tokens, and in some jobs logits, are those of ours as loaded."""

    @cache
    def logits(name: str) -> np.ndarray:
        path = pool.checkpoint.parent / "logits.npy"
        pool.workers[name].ask("logits", path=str(path), **request)
        return np.load(path)

    for name, entry in entries.items():
        found = agreement(tokens["ours"], tokens[name], lambda: logits("ours"))
        entry.same, entry.tokens, entry.margin = found.same, found.tokens, found.margin
        exact = pool.programs[name].exact
        entry.differs = exact and not found.is_exact
        if job.weighs_logits and (not exact or name == "ours prepared"):
            steps = min(found.same + 1, job.new)
            entry.error = logits_error(logits("ours")[:, 0], logits(name)[:, 0], steps)


def idle_cost(pool: Pool) -> float:
    """How many times longer ours takes beside the waiting others than alone; ends the others."""
    request, ours = task(JOBS["decode-1"]), pool.workers["ours"]
    ours.ask("generate", **request)
    beside = race({"ours": ours}, IDLE_ROUNDS, pool.workers.values(), "generate", **request)["ours"]
    for name in [name for name in pool.workers if name != "ours"]:
        pool.workers.pop(name).close()
    alone = race({"ours": ours}, IDLE_ROUNDS, [ours], "generate", **request)["ours"]
    return statistics.median(beside) / statistics.median(alone)
