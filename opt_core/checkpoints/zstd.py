# SPDX-License-Identifier: Apache-2.0
"""Zstandard frames, decoded piece by piece and never further than asked: a bomb is not blown up."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.values import Value
from opt_core.errors import FormatError

_PIECE = 2**18
_WINDOW = 2**27  # bytes that a frame may look back to; the encoder's own limit
_AGAIN = "The file is damaged or its download incomplete: fetch it again."


def decode_into(value: Value, out: NDArray[np.uint8], where: str) -> None:
    """Fill `out` with the bytes of a frame that holds exactly as many; messages begin with `where`.

    The compressed bytes are read as they are needed. Raises FormatError for a frame of another size.
    """
    frame = _Frame(value, where)
    done = 0
    while done < len(out):
        count = frame.read_into(out[done:])
        if not count:
            raise FormatError(f"{where}: expected {len(out)} bytes in zstd, found {done}. {_AGAIN}")
        done += count
    if frame.read_into(np.empty(1, np.uint8)):
        raise FormatError(f"{where}: expected {len(out)} bytes in zstd, found more. {_AGAIN}")


def decode(value: Value, limit: int, where: str) -> bytes:
    """Return the bytes of a frame; raises FormatError if there are more than `limit`, or none."""
    frame = _Frame(value, where)
    content = bytearray()
    piece = np.empty(_PIECE, np.uint8)
    while count := frame.read_into(piece):
        content += piece[:count].data
        if len(content) > limit:
            raise FormatError(
                f"{where}: expected at most {limit} bytes in zstd, found more. {_AGAIN}"
            )
    if not content:
        raise FormatError(f"{where}: expected bytes in zstd, found none. {_AGAIN}")
    return bytes(content)


class _Frame:
    """One frame while it is decoded."""

    def __init__(self, value: Value, where: str) -> None:
        import zstandard

        self._where = where
        self._error = zstandard.ZstdError
        decoder = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        source: Any = _Stream(value)
        self._reader = decoder.stream_reader(source, read_size=_PIECE)

    def read_into(self, out: NDArray[np.uint8]) -> int:
        """Fill the beginning of `out`; return how many bytes, 0 at the end."""
        try:
            return int(self._reader.readinto(out.data))
        except self._error as error:
            raise FormatError(
                f"{self._where}: expected values in zstd, found bytes that cannot be decoded "
                f"({error}). {_AGAIN}"
            ) from error


class _Stream:
    """A value as a file that is read from start to end."""

    def __init__(self, value: Value) -> None:
        self._value = value
        self._at = 0

    def read(self, size: int) -> bytes:
        """Return the next bytes, none at the end."""
        count = min(size, self._value.length - self._at)
        self._at += count
        return bytes(self._value.part(self._at - count, count).read())
