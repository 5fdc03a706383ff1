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
from opt_core.files import FileState, file_state


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
    time. A file that changes meanwhile is refused, by `check` and whenever it is closed or opened.

    Raises CheckpointError if `path` is no regular file.

    Attributes:
        mapped: a record of each mapping that was made.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a file, found none. Check the path.")
        self.path = path
        self._lock = threading.RLock()
        self._mapping: mmap.mmap | None = None
        self._closed = False
        self.mapped: list[MappedFile] = []
        self._open()
        self._state = file_state(self._file.fileno())
        self.size = self._state[2]

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
                try:
                    self.check()
                except CheckpointError:
                    self._release()
                    raise
            return self._file

    def check(self) -> None:
        """Raise CheckpointError if the file was written to, or replaced while it rested."""
        with self._lock:
            if not self._file.closed and file_state(self._file.fileno()) != self._state:
                raise CheckpointError(
                    f"{self.path}: expected the file that was opened, found it changed while it was "
                    "read. Begin again when nothing writes to it."
                )

    def memory(self) -> mmap.mmap:
        """Return the file as private memory: pages are read when touched, never written back."""
        with self._lock:
            if self._mapping is None:
                descriptor = self.file.fileno()
                self._mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
                self.mapped.append(MappedFile(self.path, self._state, self._mapping, descriptor))
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

    def named(self) -> NamedFile:
        """Return a record of the file for who goes on reading it by its name."""
        return NamedFile(self.path.resolve(), self._state)

    def rest(self) -> None:
        """Close the file until something is read from it again; raises as `check` does."""
        with self._lock:
            try:
                self.check()
            finally:
                self._release()

    def close(self) -> None:
        """Close the file; arrays that were mapped stay valid."""
        with self._lock:
            self._release()
            self._closed = True

    def _release(self) -> None:
        self._mapping = None
        self._finalizer()

    def _open(self) -> None:
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - lives as long as the source
        self._finalizer = weakref.finalize(self, self._file.close)


class NamedFile:
    """A file that a model goes on reading by its name: it must stay the one that was opened."""

    def __init__(self, path: Path, state: FileState) -> None:
        self.path = path
        self._state = state

    def check(self) -> None:
        """Raise CheckpointError if another file has the name, or the file was written to."""
        try:
            found = file_state(self.path)
        except OSError as error:
            raise self._changed(error.strerror or "it cannot be read") from error
        if found != self._state:
            raise self._changed("it has been written to, or replaced")

    def _changed(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: expected it as it was when the model was loaded, whose weights are read "
            f"from it as they are used; found: {found}. Load the model again, and save elsewhere "
            "what is newer; device_map='cpu' reads all into memory."
        )


class MappedFile:
    """The file behind a mapping: it must not be written to as long as anything uses the mapping.

    One that is replaced by renaming another is not: the mapping keeps the former one.
    """

    def __init__(self, path: Path, state: FileState, mapping: mmap.mmap, descriptor: int) -> None:
        self.path = path
        self._state = state
        self._descriptor = os.dup(descriptor)
        self._mapping = weakref.ref(mapping)
        weakref.finalize(mapping, os.close, self._descriptor).atexit = False
        self._start = np.frombuffer(mapping, np.uint8).ctypes.data

    def holds(self, address: int) -> bool:
        """Whether an address of memory lies in the mapping."""
        return self._mapping() is not None and 0 <= address - self._start < self._state[2]

    def check(self) -> None:
        """Raise CheckpointError if the file was written to, or cut, while something uses it."""
        mapping = self._mapping()  # held meanwhile, so that the descriptor stays open
        if mapping is not None and file_state(self._descriptor) != self._state:
            raise CheckpointError(
                f"{self.path}: expected it as it was when the model was loaded, whose weights are "
                "mapped from it (mmap=True, or the hub's cache); found: it has been written to. "
                "Load the model again, and with mmap=False where files are rewritten in place. "
                "save_pretrained, or saving under another name and renaming, leaves a mapped file "
                "whole."
            )


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
