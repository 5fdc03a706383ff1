# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of tensors come from: open files, or memory that looks like one."""

from __future__ import annotations

import io
import mmap
import os
import threading
import weakref
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import CheckpointError, FormatError


class ByteSource(Protocol):
    """Where tensors lie: a file, or memory that looks like one."""

    @property
    def path(self) -> Path: ...
    @property
    def size(self) -> int: ...
    def memory(self) -> Any: ...
    def read_into(self, out: NDArray[np.uint8], offset: int) -> None: ...


class FileSource:
    """One open file, read by position or through one copy-on-write mapping made on first use.

    The file stays open, so what is read is what was opened, even after another file took the name.
    `rest` closes it until it is needed again, for checkpoints of more files than may be open at a
    time; a file that changed meanwhile is refused.

    Raises CheckpointError if `path` is no regular file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a file, found none. Check the path.")
        self.path = path
        self._lock = threading.RLock()
        self._mapping: mmap.mmap | None = None
        self._closed = False
        self._open()
        self._identity = _identity(self._file)
        self.size = os.fstat(self._file.fileno()).st_size

    @property
    def file(self) -> io.FileIO:
        """The open file; opened again if it rests."""
        with self._lock:
            if self._closed:
                raise CheckpointError(
                    f"{self.path}: the reader was closed. Read the tensors while it is open."
                )
            if self._file.closed:
                self._open()
                if _identity(self._file) != self._identity:
                    raise CheckpointError(
                        f"{self.path}: expected the file that was opened, found it changed "
                        "meanwhile. Begin again."
                    )
            return self._file

    def memory(self) -> mmap.mmap:
        """Return the file as private memory: pages are read when touched, never written back."""
        with self._lock:
            if self._mapping is None:
                self._mapping = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
            return self._mapping

    def read_into(self, out: NDArray[np.uint8], offset: int) -> None:
        """Fill `out` ([bytes]) from `offset` on; raises FormatError where the file ends early."""
        with self._lock:
            file = self.file
            file.seek(offset)
            done = 0
            while done < len(out):
                count = file.readinto(out.data[done:])
                if not count:
                    raise FormatError(
                        f"{self.path}: expected {len(out)} bytes at {offset}, found {done}. The "
                        "file was cut short while it was read: fetch it again."
                    )
                done += count

    def read_bytes(self, offset: int, length: int) -> bytes:
        """Return up to `length` bytes from `offset` on, fewer at the end of the file."""
        out = np.empty(max(0, min(length, self.size - offset)), np.uint8)
        self.read_into(out, offset)
        return out.tobytes()

    def rest(self) -> None:
        """Close the file until something is read from it again."""
        with self._lock:
            self._mapping = None
            self._finalizer()

    def close(self) -> None:
        """Close the file; arrays that were mapped stay valid."""
        with self._lock:
            self.rest()
            self._closed = True

    def _open(self) -> None:
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - lives as long as the source
        self._finalizer = weakref.finalize(self, self._file.close)


def _identity(file: io.FileIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class ArraySource:
    """An array in memory that looks like a file."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.path = Path("<memory>")
        self._bytes = np.asarray(array, order="C").reshape(-1).view(np.uint8)
        self.size = len(self._bytes)

    def memory(self) -> NDArray[np.uint8]:
        """Return the bytes themselves, not a copy."""
        return self._bytes

    def read_into(self, out: NDArray[np.uint8], offset: int) -> None:
        """Fill `out` ([bytes]) from `offset` on."""
        out[:] = self._bytes[offset : offset + len(out)]
