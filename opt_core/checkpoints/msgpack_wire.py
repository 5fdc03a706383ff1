# SPDX-License-Identifier: Apache-2.0
"""The encoding called msgpack, as far as checkpoints need it: the heads of values.

A value begins with a byte that says its kind and, of a small one, its length or the value itself;
otherwise the length or value follows in 1 to 8 bytes, big-endian.
"""

from __future__ import annotations

from enum import Enum, auto

from opt_core.checkpoints.sources import FileSource
from opt_core.errors import FormatError

_WINDOW = 4096  # bytes read at a time: the text between two arrays takes some hundred


class Kind(Enum):
    """What a value is. The number that goes with it is its length; of a UINT it is the value."""

    UINT = auto()
    MAP = auto()
    LIST = auto()
    TEXT = auto()
    BYTES = auto()
    EXT = auto()  # a byte with its type follows, which the length does not count
    OTHER = auto()  # None, a boolean, a negative integer, a float


# First byte of the short form, and how many lengths it has room for.
_SHORT = {
    Kind.UINT: (0x00, 128),
    Kind.MAP: (0x80, 16),
    Kind.LIST: (0x90, 16),
    Kind.TEXT: (0xA0, 32),
}
# First byte of each long form, by how many bytes its length takes.
_LONG = {
    Kind.UINT: {1: 0xCC, 2: 0xCD, 4: 0xCE, 8: 0xCF},
    Kind.MAP: {2: 0xDE, 4: 0xDF},
    Kind.LIST: {2: 0xDC, 4: 0xDD},
    Kind.TEXT: {1: 0xD9, 2: 0xDA, 4: 0xDB},
    Kind.BYTES: {1: 0xC4, 2: 0xC5, 4: 0xC6},
    Kind.EXT: {1: 0xC7, 2: 0xC8, 4: 0xC9},
}
# First byte of forms whose length goes without saying.
_EXT = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
_OTHER = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8} | (
    dict.fromkeys(range(0xE0, 0x100), 0)
)

# First byte -> kind, bytes of the length that follows, and the length if none do.
_HEADS: dict[int, tuple[Kind, int, int]] = {
    **{base + n: (kind, 0, n) for kind, (base, room) in _SHORT.items() for n in range(room)},
    **{code: (kind, width, 0) for kind, codes in _LONG.items() for width, code in codes.items()},
    **{code: (Kind.EXT, 0, length) for length, code in _EXT.items()},
    **{code: (Kind.OTHER, 0, length) for code, length in _OTHER.items()},
}

_NONE = (Kind.OTHER, 0, 0)

TRUE = b"\xc3"


def head(kind: Kind, number: int) -> bytes:
    """Return the shortest head of that kind with that length below 2**32, or value below 2**64."""
    base, room = _SHORT.get(kind, (0, 0))
    if number < room:
        return bytes([base + number])
    width = next(width for width in _LONG[kind] if number < 256**width)
    return bytes([_LONG[kind][width]]) + number.to_bytes(width, "big")


def text(value: str) -> bytes:
    """Return a string, whole."""
    data = value.encode()
    return head(Kind.TEXT, len(data)) + data


def extension(code: int, length: int) -> bytes:
    """Return the head of an EXT and its type."""
    short = length in _EXT
    return (bytes([_EXT[length]]) if short else head(Kind.EXT, length)) + bytes([code])


def peek(data: bytes) -> tuple[Kind, bytes]:
    """Return the kind of value that some bytes begin with, and what follows its head."""
    kind, width, _ = _HEADS.get(data[0], _NONE) if data else _NONE
    return kind, data[1 + width :]


class Cursor:
    """A position in a file of msgpack values, moved by reading; raises FormatError at its end."""

    def __init__(self, source: FileSource) -> None:
        self.source = source
        self.position = 0
        self._window = b""
        self._start = 0

    def refuse(self, expected: str, found: str) -> FormatError:
        """Return the error for what stands at, or just before, this position."""
        return FormatError(
            f"{self.source.path}: at byte {self.position}: expected {expected}, found {found}. "
            "The file is damaged, its download incomplete, or it is no Flax checkpoint: fetch it "
            "again."
        )

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes, which the caller knows to be few."""
        begin = self.position - self._start
        if begin + count > len(self._window):
            self._window = self.source.read_bytes(self.position, max(count, _WINDOW))
            self._start, begin = self.position, 0
        data = self._window[begin : begin + count]
        if len(data) < count:
            raise self.refuse(f"{count} bytes", f"the end of the file after {len(data)}")
        self.position += count
        return data

    def skip(self, count: int) -> None:
        """Pass over `count` bytes without reading them."""
        if count > self.source.size - self.position:
            left = self.source.size - self.position
            raise self.refuse(f"{count} bytes", f"the end of the file after {left}")
        self.position += count

    def head(self) -> tuple[Kind, int]:
        """Return what the next value is, and its length (or value)."""
        (code,) = self.take(1)
        if code not in _HEADS:
            raise self.refuse("a msgpack value", f"the byte {code:#x}, which begins none")
        kind, width, number = _HEADS[code]
        return kind, int.from_bytes(self.take(width), "big") if width else number

    def expect(self, *kinds: Kind) -> int:
        """Return the length (or value) of the next value, which must be of one of these kinds."""
        kind, number = self.head()
        if kind not in kinds:
            raise self.refuse(" or ".join(kind.name for kind in kinds), kind.name)
        return number
