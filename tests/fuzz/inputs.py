# SPDX-License-Identifier: Apache-2.0
"""The inputs of a fuzzing run: each follows from the run's seed and its own number, nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from tests.fuzz.mutations import mutate
from tests.fuzz.seeds import Seed, all_seeds

#: How many of 20 inputs go to a reader; 20 where nothing is said.
_SHARES = {"orbax": 6, "config": 10, "index": 10, "nested": 10, "model": 10}

_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Input:
    """A damaged checkpoint: what it was made of, and its files now."""

    number: int
    seed: Seed
    files: Mapping[str, bytes]


def draw(run: int, number: int, readers: Sequence[str]) -> Input:
    """Make the input of that number of the run with that seed over these readers."""
    random = Random(f"{run}:{number}")
    (reader,) = random.choices(readers, [_SHARES.get(name, 20) for name in readers])
    seed = random.choice(all_seeds()[reader])
    files = dict(seed.files)
    for name in random.sample(seed.targets, 1 if random.random() < 0.9 else len(seed.targets)):
        if len(files) > 2 and random.random() < 0.03:
            _rearrange(random, files, name)
        else:
            files[name] = mutate(random, files.get(name, b""), _pieces())
    return Input(number, seed, files)


def _rearrange(random: Random, files: dict[str, bytes], name: str) -> None:
    """Take a file away, or put another in its place."""
    if random.random() < 0.3:
        files.pop(name, None)
    else:
        files[name] = random.choice(list(files.values()))


@cache
def _pieces() -> tuple[bytes, ...]:
    """Every small file of the seeds, to take pieces from."""
    files = (
        data for seeds in all_seeds().values() for seed in seeds for data in seed.files.values()
    )
    return tuple(dict.fromkeys(data for data in files if len(data) < 30_000))


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where the system has one, else on disk."""
    with TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        yield Path(folder)


@contextmanager
def placed(folder: Path, seed: Seed, files: Mapping[str, bytes]) -> Iterator[Path]:
    """Write the files of an input into a folder of their own; yields what is to be opened."""
    place = folder / "checkpoint"
    try:
        for name in (*files, seed.entry):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (place / name).write_bytes(data)
        yield place / seed.entry if seed.entry else place
    finally:
        shutil.rmtree(place, ignore_errors=True)
