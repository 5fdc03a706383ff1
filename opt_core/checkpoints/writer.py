# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint as safetensors: tensor by tensor, in shards, all of it or nothing."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.index import SUFFIX, CheckpointIndex
from opt_core.checkpoints.safetensors_format import (
    TensorLike,
    in_file_order,
    write_header,
)
from opt_core.errors import CheckpointError, InputError
from opt_core.files import hidden_sibling, sync_directory, sync_file

SINGLE = "model.safetensors"
INDEX = SINGLE + SUFFIX

_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?))?B", re.ASCII)
_BLOCK = 2**24


@dataclass(frozen=True)
class _Shard:
    """One file to be: its name, its header, and where each of its tensors begins."""

    filename: str
    header: bytes
    positions: Mapping[str, int]


class CheckpointWriter:
    """Stream tensors into `model.safetensors`, or into numbered shards with an index.

    A context manager. `infos` says what will be written (TensorInfo, LazyTensor, or anything with
    name, dtype and shape); `write` then takes the arrays in that order. Files grow under hidden
    names and get their own when all is on disk, so a failure leaves the directory as it was, and
    files that are mapped elsewhere keep their content. Weights of an earlier save in the directory
    go once the new ones stand. `metadata` is {"format": "pt"} unless given: other tools ask for it.

    Raises InputError for sizes, names or dtypes that cannot be written, and for a directory that is
    a file.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        infos: Iterable[TensorLike],
        *,
        max_shard_size: int | str = "5GB",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = Path(directory)
        if self._directory.exists() and not self._directory.is_dir():
            raise InputError(f"{directory}: expected a directory to save into, found a file.")
        self._infos = list(infos)
        metadata = {"format": "pt"} if metadata is None else metadata
        write_header(self._infos, metadata)  # refuses bad names and dtypes across all shards
        groups = _split(self._infos, parse_size(max_shard_size))
        self._shards = [
            _plan(group, _shard_name(number, len(groups)), metadata)
            for number, group in enumerate(groups, start=1)
        ]
        self._written = 0
        self._current = -1
        self._file: IO[bytes] | None = None
        self._temporary: dict[str, Path] = {}
        self._created: list[Path] = []

    def __enter__(self) -> Self:
        above = (self._directory, *self._directory.parents)
        self._created = [path for path in above if not path.exists()]
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._begin_shard()
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Write the next tensor; casting it is the caller's job.

        Raises InputError unless name, dtype and shape are those announced, in the order announced.
        """
        if self._file is None or self._written == len(self._infos):
            raise InputError(f"{name}: expected no tensor now: all announced are written.")
        info = self._infos[self._written]
        if (name, array.dtype, array.shape) != (info.name, info.dtype, tuple(info.shape)):
            raise InputError(
                f"{self._directory}: expected {info.name} {info.dtype} {tuple(info.shape)} next, "
                f"found {name} {array.dtype} {array.shape}. Write what was announced, in its order."
            )
        if name not in self._shards[self._current].positions:
            self._end_shard()
            self._begin_shard()
        self._file.seek(self._shards[self._current].positions[name])
        for block in _blocks(array):
            self._file.write(block.data)
        self._written += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
                self._created = []
        finally:
            self._discard()

    def _begin_shard(self) -> None:
        self._current += 1
        shard = self._shards[self._current]
        self._file = open(self._add_file(shard.filename), "xb")  # noqa: SIM115 - see _end_shard
        self._file.write(shard.header)

    def _end_shard(self) -> None:
        if self._file is not None:
            sync_file(self._file)
            self._file.close()

    def _add_file(self, filename: str) -> Path:
        return self._temporary.setdefault(filename, hidden_sibling(self._directory / filename))

    def _commit(self) -> None:
        """Give the files their names, and take those of an earlier save away."""
        if self._written != len(self._infos):
            missing = [info.name for info in self._infos[self._written :]]
            raise CheckpointError(
                f"{self._directory}: expected {len(self._infos)} tensors, found {self._written}: "
                f"{missing[0]} and what follows was not written. Nothing was saved."
            )
        self._end_shard()
        if len(self._shards) > 1:
            with open(self._add_file(INDEX), "xb") as file:
                file.write(self._index().to_json().encode())
                sync_file(file)
        old = {entry.name for entry in self._directory.iterdir() if _OURS.fullmatch(entry.name)}
        backups: list[Path] = []
        moves: list[tuple[Path, Path]] = []
        try:
            for filename in (*self._temporary, *sorted(old - self._temporary.keys())):
                path = self._directory / filename
                if filename in old and not path.is_dir():
                    backups.append(hidden_sibling(path))
                    _move(path, backups[-1], moves)
                if filename in self._temporary:
                    _move(self._temporary[filename], path, moves)
        except BaseException:
            for source, target in reversed(moves):
                os.rename(target, source)
            raise
        sync_directory(self._directory)
        for backup in backups:
            backup.unlink()

    def _index(self) -> CheckpointIndex:
        where = {name: shard.filename for shard in self._shards for name in shard.positions}
        total = sum(_nbytes(info) for info in self._infos)
        return CheckpointIndex(self._directory / INDEX, where, total)

    def _discard(self) -> None:
        """Remove what is left of the attempt: nothing after a success."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for path in self._temporary.values():
            path.unlink(missing_ok=True)
        for directory in self._created:
            with suppress(OSError):  # somebody else has put something there meanwhile
                directory.rmdir()


def parse_size(size: int | str) -> int:
    """Return a size in bytes: 5000, "5GB" (10**9 each), "5GiB" (2**30 each).

    Raises InputError for anything else, and for less than one byte.
    """
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is not None:
        number, letter, binary = match.groups()
        base = 1024 if binary else 1000
        size = int(float(number) * base ** (" KMGT".index(letter) if letter else 0))
    if type(size) is not int or size < 1:
        raise InputError(
            f'max_shard_size: expected bytes as a positive int or a string such as "5GB" or '
            f'"500MiB", found {size!r}.'
        )
    return size


def _nbytes(info: TensorLike) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _split(infos: list[TensorLike], limit: int) -> list[list[TensorLike]]:
    """Fill shards in order up to `limit` bytes; a tensor beyond it gets a shard of its own."""
    groups: list[list[TensorLike]] = [[]]
    filled = 0
    for info in infos:
        if groups[-1] and filled + _nbytes(info) > limit:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += _nbytes(info)
    return groups


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _plan(infos: list[TensorLike], filename: str, metadata: Mapping[str, str]) -> _Shard:
    ordered = in_file_order(infos)
    header = write_header(ordered, metadata)
    positions: dict[str, int] = {}
    position = len(header)
    for info in ordered:
        positions[info.name] = position
        position += _nbytes(info)
    return _Shard(filename, header, positions)


def _blocks(array: NDArray[Any]) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes in C order; an array in another order is copied a few rows at a time."""
    if array.flags.c_contiguous:
        yield array.reshape(-1).view(np.uint8)
        return
    rows = max(1, _BLOCK * len(array) // array.nbytes)
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows]).reshape(-1).view(np.uint8)


def _move(source: Path, target: Path, moves: list[tuple[Path, Path]]) -> None:
    os.rename(source, target)
    moves.append((source, target))
