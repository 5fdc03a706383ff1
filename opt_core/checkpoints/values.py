# SPDX-License-Identifier: Apache-2.0
"""The values of a folder that serves as a database: a key each, and where its bytes lie."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.sources import ArraySource, ByteSource, FileSource
from opt_core.errors import CheckpointError, FormatError
from opt_core.files import check_link

_MAX_FILES = 2**20


@dataclass(frozen=True)
class Value:
    """A run of bytes in a file or in memory."""

    source: ByteSource
    offset: int
    length: int

    def read(self) -> bytearray:
        """Return the bytes."""
        out = bytearray(self.length)
        self.read_into(np.frombuffer(out, np.uint8))
        return out

    def read_into(self, out: NDArray[np.uint8]) -> None:
        """Fill `out` ([length]); the file is closed again: a folder may have very many."""
        self.source.read_into(out, self.offset)
        if isinstance(self.source, FileSource):
            self.source.rest()

    def part(self, offset: int, length: int) -> Value:
        """Return a run within this one."""
        return Value(self.source, self.offset + offset, length)


def memory_value(data: bytes) -> Value:
    """Return bytes in memory as a value."""
    return Value(ArraySource(np.frombuffer(data, np.uint8)), 0, len(data))


def file_value(path: Path) -> Value:
    """Return a whole file as a value."""
    source = FileSource(path)
    source.rest()
    return Value(source, 0, source.size)


def scan(directory: Path) -> dict[str, Path]:
    """Return every file below `directory` by its path from there, with "/".

    Raises FormatError for a link that leads out, a folder that is a link, and what is no file.
    A link to a file may lead into the cache of the hub, if the directory stands in it: there every
    file is such a link.
    """
    files: dict[str, Path] = {}
    for folder, folders, names in os.walk(directory, onerror=_unreadable):
        for name in (*folders, *names):
            path = Path(folder, name)
            _check_entry(path, directory)
            if name in names:
                files[path.relative_to(directory).as_posix()] = path
        if len(files) > _MAX_FILES:
            raise FormatError(f"{directory}: expected at most {_MAX_FILES} files, found more.")
    return files


def _check_entry(path: Path, directory: Path) -> None:
    check_link(path, directory)
    mode = path.lstat().st_mode
    if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise FormatError(f"{path}: expected files and folders, found something else.")


def _unreadable(error: OSError) -> None:
    raise CheckpointError(f"{error.filename}: cannot be listed ({error.strerror}).") from error
