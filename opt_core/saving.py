# SPDX-License-Identifier: Apache-2.0
"""From parameters, wherever their values lie, to the files of a format."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import numpy as np

from opt_core.checkpoints import CheckpointWriter, LazyTensor, TensorInfo
from opt_core.checkpoints.output import Blocks, nbytes
from opt_core.formats import Format
from opt_core.loading import Source
from opt_core.params import Param

_Item = TypeVar("_Item")

#: Called with the bytes written so far and the bytes of all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Outgoing:
    """A parameter to be written: in which dtype, and a function that says where its values lie."""

    param: Param
    dtype: np.dtype[Any]
    source: Callable[[], Source]

    @classmethod
    def of(cls, source: Source, dtype: np.dtype[Any]) -> Outgoing:
        """What lies in a checkpoint already."""
        return cls(source.param, dtype, lambda: source)

    def info(self, format: Format, architecture: str, folder: Path) -> TensorInfo:
        """The tensor that it becomes in files of that format."""
        dialect, param = format.dialect, self.param
        shape = param.shape[::-1] if dialect.transposed(param) else param.shape
        return TensorInfo(dialect.name(param, architecture), self.dtype, shape, folder)

    def blocks(self, format: Format) -> Blocks:
        """Its values, a few megabytes at a time, as files of that format hold them."""
        return self.source().blocks(format.dialect.transposed(self.param), self.dtype)


@dataclass(frozen=True)
class Added:
    """A tensor beyond the parameter table, of a module of the user's: written under its own name."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def info(self, format: Format, architecture: str, folder: Path) -> TensorInfo:
        return TensorInfo(self.name, self.dtype, self.shape, folder)

    def blocks(self, format: Format) -> Blocks:
        return LazyTensor.from_array(self.name, self.read()).blocks()


def write_weights(
    folder: Path,
    outgoing: Sequence[Outgoing | Added],
    format: Format,
    architecture: str,
    *,
    max_shard_size: int | str = "5GB",
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes the weights of one model into a folder, one tensor in memory at a time.

    Files that are complete in the folder already are kept.

    Raises:
        InputError: a size that cannot be read, or a dtype that the format has no place for.
        CheckpointError: a value that its new dtype cannot hold.
        OSError: as the system says.
    """
    infos = [out.info(format, architecture, folder) for out in outgoing]
    total = sum(map(nbytes, infos))
    with CheckpointWriter(
        folder, infos, format.layout, max_shard_size=max_shard_size, keep_complete=True
    ) as writer:
        missing = writer.missing
        done = sum(nbytes(info) for info in infos if info.name not in missing)
        progress(done, total)

        def counted(blocks: Iterable[tuple[str, np.ndarray]]) -> Blocks:
            nonlocal done
            for _, block in blocks:
                yield block
                done += block.nbytes
                progress(done, total)

        todo = [
            (out, info.name)
            for out, info in zip(outgoing, infos, strict=True)
            if info.name in missing
        ]
        with closing(_ahead(_blocks(todo, format))) as blocks:
            for name, pairs in groupby(blocks, key=itemgetter(0)):
                writer.write(name, counted(pairs))


def _blocks(
    outgoing: Sequence[tuple[Outgoing | Added, str]], format: Format
) -> Iterator[tuple[str, np.ndarray]]:
    """The values of all tensors, block by block, each with the name of its tensor."""
    for out, name in outgoing:
        for block in out.blocks(format):
            yield name, block


def _ahead(items: Iterator[_Item]) -> Generator[_Item, None, None]:
    """The items, each made by another thread while the one before it is used.

    So reading, turning and casting go on while the system writes. The queues are in C: a signal that
    is an exception in the midst of Python's own locks would leave them locked.
    """
    wanted: SimpleQueue[bool] = SimpleQueue()
    made: SimpleQueue[tuple[_Item | None, BaseException | None]] = SimpleQueue()

    def make() -> None:
        while wanted.get():
            try:
                made.put((next(items, None), None))
            except BaseException as error:  # noqa: BLE001 - raised again where the items are used
                made.put((None, error))

    thread = Thread(target=make, daemon=True)
    thread.start()
    try:
        wanted.put(True)
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is None:
                return
            wanted.put(True)
            yield item
    finally:
        wanted.put(False)
        thread.join()
