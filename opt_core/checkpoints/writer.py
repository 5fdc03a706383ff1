# SPDX-License-Identifier: Apache-2.0
"""Write the weights of a checkpoint into a folder: tensor by tensor, in shards, with an index."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from opt_core.checkpoints.index import CheckpointIndex
from opt_core.checkpoints.layouts import SAFETENSORS, Layout
from opt_core.checkpoints.output import Blocks, TensorLike, WeightsFile, nbytes
from opt_core.checkpoints.reader import CheckpointReader
from opt_core.errors import CheckpointError, InputError
from opt_core.files import atomic_write, remove, sync_directory

_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?) ?(?:(?:([kmgt])(i?))?b)?", re.ASCII | re.IGNORECASE)
_PART = ".part"


@dataclass(frozen=True)
class Shard:
    """One file to be, and the tensors in it."""

    filename: str
    infos: tuple[TensorLike, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes of the values."""
        return sum(map(nbytes, self.infos))

    def is_in(self, folder: Path) -> bool:
        """Whether the folder has the file, and its header tells of these tensors and no others."""
        if not (folder / self.filename).exists():
            return False
        try:
            with CheckpointReader.open(folder / self.filename) as reader:
                found = {name: (t.dtype, t.shape) for name, t in reader.items()}
        except CheckpointError:
            return False
        return found == {info.name: (info.dtype, tuple(info.shape)) for info in self.infos}


def split(infos: Iterable[TensorLike], layout: Layout, max_shard_size: int | str) -> list[Shard]:
    """Fill shards in order up to the size; a tensor beyond it gets one of its own.

    Raises InputError for a size that cannot be read.
    """
    limit = parse_size(max_shard_size)
    groups: list[list[TensorLike]] = [[]]
    filled = 0
    for info in infos:
        if layout.index is not None and groups[-1] and filled + nbytes(info) > limit:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += nbytes(info)
    return [
        Shard(layout.filename(number, len(groups)), tuple(group))
        for number, group in enumerate(groups)
    ]


class CheckpointWriter:
    """Stream tensors into the files of a layout, in a folder that nobody reads yet.

    A context manager. `infos` says what will be written (TensorInfo, LazyTensor, or anything with
    name, dtype and shape); `write` then takes the values in that order. A file has its name only when
    it is complete and on the disk. With `keep_complete` one that has it already is kept, and `write`
    must not be called for its tensors: see `missing`. `opt_core.staging` makes all of them appear at
    once.

    Raises InputError for sizes, names or dtypes that cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        infos: Iterable[TensorLike],
        layout: Layout = SAFETENSORS,
        *,
        max_shard_size: int | str = "5GB",
        keep_complete: bool = False,
    ) -> None:
        self._folder = folder
        self._layout = layout
        self.shards = split(infos, layout, max_shard_size)
        names = [info.name for shard in self.shards for info in shard.infos]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"expected names that differ, found {twice!r} twice.")
        self._todo = [shard for shard in self.shards if not (keep_complete and shard.is_in(folder))]
        self._queue = [info for shard in self._todo for info in shard.infos]
        self._next = 0
        self._left = 0  # tensors of the current file still to come
        self._file: WeightsFile | None = None

    @property
    def missing(self) -> frozenset[str]:
        """Names of the tensors that `write` expects: those of files that are not there yet."""
        return frozenset(info.name for info in self._queue)

    def __enter__(self) -> Self:
        return self

    def write(self, name: str, blocks: Blocks | np.ndarray[Any, Any]) -> None:
        """Write the next tensor: an array, or arrays that follow one another in C order.

        Raises InputError unless name, dtype and size are those announced, in the order announced.
        """
        if self._next == len(self._queue):
            raise InputError(f"{name}: expected no tensor now: all announced are written.")
        info = self._queue[self._next]
        if name != info.name:
            raise InputError(
                f"{self._folder}: expected {info.name} next, found {name}. Write what was "
                "announced, in its order."
            )
        if isinstance(blocks, np.ndarray):
            if blocks.shape != tuple(info.shape):
                raise InputError(
                    f"{name}: expected the announced shape {tuple(info.shape)}, found {blocks.shape}."
                )
            blocks = (blocks,)
        file = self._file or self._begin()
        file.write(name, blocks)
        self._next += 1
        self._left -= 1
        if not self._left:
            self._end()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._complete()
        finally:
            if self._file is not None:
                self._file.close()

    def _current(self) -> Shard:
        return self._todo[0]

    def _part(self) -> Path:
        return self._folder / (self._current().filename + _PART)

    def _begin(self) -> WeightsFile:
        shard = self._current()
        remove(self._part())
        self._file = self._layout.create(self._part(), shard.infos, self._layout.metadata)
        self._left = len(shard.infos)
        return self._file

    def _end(self) -> None:
        if self._file is not None:
            self._file.finish()
            os.replace(self._part(), self._folder / self._current().filename)
            self._file = None
            del self._todo[0]

    def _complete(self) -> None:
        if self._next != len(self._queue):
            raise CheckpointError(
                f"{self._folder}: expected {len(self._queue)} tensors, found {self._next}: "
                f"{self._queue[self._next].name} and what follows was not written."
            )
        if self._todo:  # a file without tensors
            self._begin()
            self._end()
        if len(self.shards) > 1 and self._layout.index is not None:
            atomic_write(self._folder / self._layout.index, self._index().to_json())
        sync_directory(self._folder)

    def _index(self) -> CheckpointIndex:
        places = (
            (self._layout.index_key(info.name), shard.filename)
            for shard in self.shards
            for info in shard.infos
        )
        total = sum(shard.nbytes for shard in self.shards)
        return CheckpointIndex.build(self._folder / str(self._layout.index), places, total)


def parse_size(size: int | str) -> int:
    """Return a size in bytes: 5000, "5GB" (10**9 each), "5GiB" (2**30 each).

    Raises InputError for anything else, and for less than one byte.
    """
    nbytes = size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is not None:
        number, letter, binary = match.groups(default="")
        base = 1024 if binary else 1000
        nbytes = int(float(number) * base ** " kmgt".index(letter.lower() or " "))
    if type(nbytes) is not int or nbytes < 1:
        raise InputError(
            'max_shard_size: expected a number of bytes, or such as "5GB" or "500MiB", found '
            f"{str(size)[:100]!r}."
        )
    return nbytes
