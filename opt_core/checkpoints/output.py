# SPDX-License-Identifier: Apache-2.0
"""One file of a checkpoint while it is written: tensors come in the order announced, in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import InputError
from opt_core.files import sync_file

Blocks = Iterable[NDArray[Any]]


class TensorLike(Protocol):
    """Whatever says what a tensor will be: a TensorInfo, a LazyTensor."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


_RUN = 2**27  # bytes
_PIECE = 2**17


class WeightsFile(Protocol):
    """A file (or folder) being written.

    `write` takes a tensor's values in C order, in one or several arrays; `finish` completes the file
    and pushes it to the disk; `close` lets go of it, finished or not, and may be called twice.
    """

    def write(self, name: str, blocks: Blocks) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


#: Makes a new file for tensors that are announced; the mapping is metadata, where there is room.
CreateFile = Callable[[Path, Sequence[TensorLike], Mapping[str, str]], WeightsFile]


class PositionedFile:
    """A file whose layout is known before the values: texts and tensors at fixed positions.

    `texts` maps positions to bytes, `positions` names of tensors to where their values begin.
    Raises InputError for a tensor that was not announced so.
    """

    def __init__(
        self,
        path: Path,
        infos: Iterable[TensorLike],
        texts: Mapping[int, bytes],
        positions: Mapping[str, int],
    ) -> None:
        self._path = path
        self._infos = {info.name: info for info in infos}
        self._positions = positions
        self._file = open(path, "xb")  # noqa: SIM115 - see close
        self._waiting = 0  # bytes that the system may not have pushed to the disk yet
        for position, text in texts.items():
            self._file.seek(position)
            self._file.write(text)

    def write(self, name: str, blocks: Blocks) -> None:
        self._file.seek(self._positions[name])
        for block in checked(self._infos[name], blocks):
            self.put(block)

    def put(self, data: NDArray[np.uint8]) -> None:
        """Write where the file stands; what was written goes to the disk from time to time."""
        write_pieces(self._file, data)
        self._waiting += len(data)
        if self._waiting >= _RUN:
            sync_file(self._file)
            self._waiting = 0

    def finish(self) -> None:
        sync_file(self._file)
        self.close()

    def close(self) -> None:
        self._file.close()


def write_pieces(file: IO[bytes], data: NDArray[np.uint8]) -> None:
    """Write bytes where a file stands, a little at a time.

    For large writes Linux may seek large runs of free memory, which can take ten times as long.
    """
    for start in range(0, len(data), _PIECE):
        file.write(data[start : start + _PIECE].data)


def nbytes(info: TensorLike) -> int:
    """Return the number of bytes of a tensor's values."""
    return math.prod(info.shape) * info.dtype.itemsize


def checked(info: TensorLike, blocks: Blocks) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of blocks that are what `info` announces; raises InputError if they are not."""
    left = math.prod(info.shape)
    for block in blocks:
        left -= block.size
        if block.dtype != info.dtype or left < 0:
            raise InputError(
                f"{info.name}: expected {info.dtype} {tuple(info.shape)}, found {block.dtype} "
                f"{block.shape}. Write what was announced."
            )
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8)
    if left:
        raise InputError(
            f"{info.name}: expected {info.dtype} {tuple(info.shape)}, found {left} elements too few."
        )
