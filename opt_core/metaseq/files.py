# SPDX-License-Identifier: Apache-2.0
"""The files of a metaseq checkpoint: found by their names, open only a few at a time."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.sources import FileSource
from opt_core.errors import CheckpointError, FormatError

MAX_OPEN = 64
"""Files: 992 make up the largest model, and many systems allow a process 256 or 1024."""

_NAME = re.compile(r"(?P<stem>.+?)(?:-model_part-(?P<part>\d+))?(?:-shard(?P<shard>\d+))?\.pt")
_OTHERS = ("optimizer.pt", "scheduler.pt")
"""What transformers' Trainer leaves beside its own checkpoints."""


@dataclass(frozen=True)
class Grid:
    """The files of one checkpoint: a row per model-parallel part, in it a file per FSDP rank."""

    rows: tuple[tuple[Path, ...], ...]

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.rows[0][0].parent


@dataclass(frozen=True, order=True)
class _Series:
    """What the files of one checkpoint have in common."""

    stem: str
    has_parts: bool
    has_shards: bool

    def filename(self, part: int, shard: int) -> str:
        part_text = f"-model_part-{part}" if self.has_parts else ""
        shard_text = f"-shard{shard}" if self.has_shards else ""
        return f"{self.stem}{part_text}{shard_text}.pt"


def candidates(folder: Path) -> list[Path]:
    """Return the files of a folder that metaseq may have written, by their names."""
    files = (
        file for file in folder.iterdir() if file.name not in _OTHERS and _NAME.fullmatch(file.name)
    )
    return sorted(file for file in files if file.is_file())


def find_grid(path: Path) -> Grid:
    """Return the files of the checkpoint at `path`: a folder, or one of the files.

    Raises CheckpointError if there is none, or more than one in the folder, and FormatError if one
    of the numbered files is missing.
    """
    if path.is_file():
        match = _NAME.fullmatch(path.name)
        if match is None:
            return Grid(((path,),))
        series, folder = _series(match), path.parent
    elif path.is_dir():
        series, folder = _only_series(path), path
    else:
        raise CheckpointError(f"{path}: expected a file or a directory, found none there.")
    numbers: dict[tuple[int, int], Path] = {}
    for file in candidates(folder):
        match = _NAME.fullmatch(file.name)
        if match and _series(match) == series:
            place = (int(match["part"] or 0), int(match["shard"] or 0))
            if numbers.setdefault(place, file) != file:
                raise FormatError(f"{file}: expected one file of that number, found two.")
    return _arrange(series, folder, numbers)


def _series(match: re.Match[str]) -> _Series:
    return _Series(match["stem"], match["part"] is not None, match["shard"] is not None)


def _only_series(folder: Path) -> _Series:
    matches = (_NAME.fullmatch(file.name) for file in candidates(folder))
    found = sorted({_series(match) for match in matches if match})
    if not found:
        raise CheckpointError(f"{folder}: expected *.pt files as metaseq writes them, found none.")
    if len(found) > 1:
        names = ", ".join(series.filename(0, 0) for series in found[:5])
        raise CheckpointError(
            f"{folder}: expected one checkpoint of metaseq, found {len(found)}, such as {names}. "
            "Give one of its files instead of the directory."
        )
    return found[0]


def _arrange(series: _Series, folder: Path, numbers: dict[tuple[int, int], Path]) -> Grid:
    parts = 1 + max(part for part, _ in numbers)
    shards = 1 + max(shard for _, shard in numbers)
    rows = []
    for part in range(parts):
        for shard in range(shards):  # ends at the first gap, however large the numbers claim to be
            if (part, shard) not in numbers:
                raise FormatError(
                    f"{folder}: expected {series.filename(part, shard)}, found none among "
                    f"{len(numbers)} files of that checkpoint (parts 0 to {parts - 1}, shards 0 to "
                    f"{shards - 1}). The download is incomplete: fetch the missing file."
                )
        rows.append(tuple(numbers[part, shard] for shard in range(shards)))
    return Grid(tuple(rows))


class RestingSource(FileSource):
    """A file that is closed again when many others of its pool have been read since."""

    def __init__(self, path: Path, pool: Pool) -> None:
        super().__init__(path)
        self._pool = pool
        pool.used(self)

    def read_into(self, out: NDArray[np.uint8], offset: int) -> None:
        """Fill `out` ([bytes]) from `offset` on; raises FormatError where the file ends early."""
        super().read_into(out, offset)
        self._pool.used(self)  # no lock is held by now: another file's may be taken


class Pool:
    """Files of which the `MAX_OPEN` used last are open."""

    def __init__(self) -> None:
        self.sources: list[RestingSource] = []
        self._open: dict[RestingSource, None] = {}
        self._lock = threading.Lock()

    def open(self, path: Path) -> RestingSource:
        """Open a file; raises CheckpointError if there is none."""
        self.sources.append(RestingSource(path, self))
        return self.sources[-1]

    def used(self, source: RestingSource) -> None:
        """Note that a file was read just now, and close the one that was not for longest."""
        with self._lock:
            self._open.pop(source, None)
            self._open[source] = None
            oldest = next(iter(self._open)) if len(self._open) > MAX_OPEN else None
            if oldest is not None:
                del self._open[oldest]
        if oldest is not None:
            oldest.rest()

    def close(self) -> None:
        """Close all files; may be called twice."""
        for source in self.sources:
            source.close()
