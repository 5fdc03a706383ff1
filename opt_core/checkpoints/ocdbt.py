# SPDX-License-Identifier: Apache-2.0
"""OCDBT, the database of tensorstore in which orbax keeps arrays: where the value of each key lies.

Source of the layout: https://google.github.io/tensorstore/kvstore/ocdbt/index.html. A manifest names
the root of a B+tree, its nodes lie in data files, and so do the values. The reader is our own since
tensorstore's trusts the database: it reserves memory for what a node claims, and follows the paths
written in it. Here a data file is one of those found in the folder, and all that is done is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from opt_core.checkpoints.checksums import crc32c
from opt_core.checkpoints.sources import FileSource
from opt_core.checkpoints.values import Value, file_value, memory_value
from opt_core.checkpoints.zstd import decode
from opt_core.errors import FormatError

MANIFEST = "manifest.ocdbt"

_MANIFEST_MAGIC = 0x0CDB3A2A
_NODE_MAGIC = 0x0CDB20DE
_HEADER = 12  # magic, length
_MAX_KEY = 512
_MAX_ENTRIES = 2**17  # a model of 1600 arrays on 64 devices has 10**5
_MAX_BYTES = 2**23  # of all nodes; those of that model take 5 * 10**6
_MAX_NODES = 1000  # of some megabytes each, but one may be named again and again
_MISSING = 2**64 - 1  # the root of a version without keys


@dataclass(frozen=True)
class _Node:
    """Where a node lies, its height, what its keys begin with, and the folder of its files."""

    value: Value
    height: int
    prefix: bytes
    base: str


def read_ocdbt(directory: Path, files: Mapping[str, Path]) -> dict[str, Value]:
    """Return where the value of each key lies; `files` is what `scan` found in `directory`.

    Raises FormatError for a database that is damaged, lies about itself, or is too large.
    """
    return _Database(directory, files).read()


class _Database:
    def __init__(self, directory: Path, files: Mapping[str, Path]) -> None:
        self._manifest = directory / MANIFEST
        self._files = files
        self._opened: dict[str, Value] = {}
        self._entries = _MAX_ENTRIES
        self._bytes = _MAX_BYTES

    def read(self) -> dict[str, Value]:
        values: dict[str, Value] = {}
        todo = list(self._roots())
        nodes = 0
        while todo:
            nodes += 1
            if nodes > _MAX_NODES:
                raise self.wrong(f"at most {_MAX_NODES} nodes", "more")
            node = todo.pop()
            for key, value in self._read_node(node, todo):
                if key in values:
                    raise self.wrong("each key once", f"{key!r} twice")
                values[key] = value
        self._check_disjoint(values)
        return values

    def wrong(self, expected: str, found: str) -> FormatError:
        return FormatError(
            f"{self._manifest}: expected {expected}, found {found}. The checkpoint is damaged or "
            "its download incomplete: fetch it again."
        )

    def spend(self, entries: int) -> int:
        """Count what is about to be made."""
        self._entries -= entries
        if self._entries < 0:
            raise self.wrong(f"at most {_MAX_ENTRIES} entries", "more")
        return entries

    def file(self, path: str) -> Value:
        """Return the data file of that path, one of those in the folder."""
        if path not in self._opened:
            if path not in self._files:
                raise self.wrong(f"the data file {path[:200]!r} in the folder", "none")
            self._opened[path] = file_value(self._files[path])
        return self._opened[path]

    def part(self, path: str, offset: int, length: int) -> Value:
        """Return a run of a data file that lies within it."""
        file = self.file(path)
        if offset + length > file.length:
            raise self.wrong(f"{offset + length} bytes in {path}", f"a file of {file.length} bytes")
        return file.part(offset, length)

    def _roots(self) -> Iterator[_Node]:
        """Yield the root of the latest version, if it has one."""
        body = self._open(file_value(self._manifest), _MANIFEST_MAGIC)
        body.take(16)  # uuid
        if body.byte():
            raise self.wrong("a manifest in one file", "one in several")
        body.varints(2)  # sizes for writers
        body.byte()  # arity of the tree of versions
        if body.varint():
            body.take(4)  # level of compression
        table = body.data_files("")
        count = body.count()
        body.varints(count)  # generations
        heights = body.take(count)
        where = body.places(table, count)
        if not count:
            raise self.wrong("a version", "none")
        path, base, offset, length = where[-1]
        if length != _MISSING:
            yield _Node(self.part(path, offset, length), heights[-1], b"", base)

    def _read_node(self, node: _Node, todo: list[_Node]) -> Iterator[tuple[str, Value]]:
        """Yield keys and values of a leaf; of another node put the children into `todo`."""
        body = self._open(node.value, _NODE_MAGIC)
        if body.byte() != node.height:
            raise self.wrong(f"a node of height {node.height}", "another")
        table = body.data_files(node.base)
        count = body.count()
        starts = [0, *body.varints(count - 1)] if count else []
        lengths = body.varints(count)
        common = body.varints(count) if node.height else []
        keys = body.keys(starts, lengths)
        if not node.height:
            values = body.values(table, count)
            for key, value in zip(keys, values, strict=True):
                yield self._text(node.prefix + key), value
            return
        where = body.places(table, count)
        for key, length, (path, base, offset, size) in zip(keys, common, where, strict=True):
            child = self.part(path, offset, size)
            todo.append(_Node(child, node.height - 1, node.prefix + key[:length], base))

    def _open(self, value: Value, magic: int) -> _Body:
        """Return what a manifest or node says, checked and decoded."""
        self._spend_bytes(value.length)
        data = bytes(value.read())
        head = _Body(self, data)
        if (
            len(data) < _HEADER + 6
            or int.from_bytes(head.take(4), "big") != magic
            or int.from_bytes(head.take(8), "little") != len(data)
        ):
            raise self.wrong(f"{len(data)} bytes that begin with {magic:08x}", "others")
        if crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise self.wrong("the checksum of its content", "another")
        if head.varint():
            raise self.wrong("version 0", "a later one")
        compression = head.varint()
        rest = head.rest()[:-4]
        if compression > 1:
            raise self.wrong("no compression or zstd", f"compression {compression}")
        if compression:
            rest = decode(memory_value(rest), self._bytes, str(self._manifest))
            self._spend_bytes(len(rest))
        return _Body(self, rest)

    def _spend_bytes(self, count: int) -> None:
        self._bytes -= count
        if self._bytes < 0:
            raise self.wrong(f"at most {_MAX_BYTES} bytes of nodes", "more")

    def _text(self, key: bytes) -> str:
        try:
            return key[: _MAX_KEY + 1].decode()
        except UnicodeDecodeError as error:
            raise self.wrong("keys in UTF-8", repr(key[:100])) from error

    def _check_disjoint(self, values: Mapping[str, Value]) -> None:
        runs = sorted(
            (str(value.source.path), value.offset, value.offset + value.length, key)
            for key, value in values.items()
            if isinstance(value.source, FileSource)
        )
        for (file, _, end, key), (other, begin, _, second) in pairwise(runs):
            if file == other and begin < end:
                raise self.wrong("values that lie apart", f"{key!r} and {second!r} in one place")


class _Body:
    """Reads fields one after another; what is not there is a FormatError."""

    def __init__(self, database: _Database, data: bytes) -> None:
        self._database = database
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        data = self._data[self._at : self._at + count]
        if len(data) != count:
            raise self._database.wrong(f"{count} more bytes", f"{len(data)}")
        self._at += count
        return data

    def rest(self) -> bytes:
        return self._data[self._at :]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        """Seven bits a byte, lowest first."""
        value = 0
        for shift in range(0, 64, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise self._database.wrong("a number below 2**64", "a larger one")

    def varints(self, count: int) -> list[int]:
        return [self.varint() for _ in range(count)]

    def count(self) -> int:
        """A number of entries: each takes bytes and is counted."""
        return self._database.spend(self.varint())

    def keys(self, starts: list[int], lengths: list[int]) -> list[bytes]:
        """Byte strings of which each begins with so many bytes of the one before it."""
        keys: list[bytes] = []
        for start, length in zip(starts, lengths, strict=True):
            before = keys[-1] if keys else b""
            if start > len(before) or start + length > _MAX_KEY:
                raise self._database.wrong(
                    f"names of at most {_MAX_KEY} bytes", f"one of {start} + {length}"
                )
            keys.append(before[:start] + self.take(length))
        return keys

    def data_files(self, base: str) -> list[tuple[str, str]]:
        """The table of data files: path of each, and the folder that its nodes count from."""
        count = self.count()
        starts = [0, *self.varints(count - 1)] if count else []
        lengths = self.varints(count)
        bases = self.varints(count)
        table = []
        for path, length in zip(self.keys(starts, lengths), bases, strict=True):
            text = path.decode("utf-8", "backslashreplace")
            table.append((base + text, base + path[:length].decode("utf-8", "backslashreplace")))
        return table

    def places(self, table: list[tuple[str, str]], count: int) -> list[tuple[str, str, int, int]]:
        """Where nodes lie (path, folder, offset, length), and statistics, which are passed over."""
        files = [self._file(table, index) for index in self.varints(count)]
        offsets, lengths = self.varints(count), self.varints(count)
        self.varints(3 * count)
        runs = zip(files, offsets, lengths, strict=True)
        return [(path, base, offset, length) for (path, base), offset, length in runs]

    def values(self, table: list[tuple[str, str]], count: int) -> Iterator[Value]:
        """Where the values of a leaf lie: here, or in a data file."""
        lengths = self.varints(count)
        kinds = self.take(count)
        outside = sum(kinds)
        if max(kinds, default=0) > 1:
            raise self._database.wrong("values here or outside", f"kind {max(kinds)}")
        files = [self._file(table, index) for index in self.varints(outside)]
        runs = iter(list(zip(files, self.varints(outside), strict=True)))
        for length, kind in zip(lengths, kinds, strict=True):
            if kind:
                (path, _), offset = next(runs)
                yield self._database.part(path, offset, length)
            else:
                yield memory_value(self.take(length))

    def _file(self, table: list[tuple[str, str]], index: int) -> tuple[str, str]:
        if index >= len(table):
            raise self._database.wrong(f"one of {len(table)} data files", f"number {index}")
        return table[index]
