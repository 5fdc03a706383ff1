# SPDX-License-Identifier: Apache-2.0
"""The skeleton of an HDF5 file: superblock, groups and object headers, read without libhdf5.

Only what libhdf5 writes for its oldest readers is understood, which is h5py's default and what Keras
and TensorFlow use: superblock 0 and 1, groups as B-trees of symbol tables, object headers 1. Sources:
HDF5 File Format Specification 3.0, II.A, III.A.1, III.B-E, IV.A.1.a.

Whatever reads a piece of the file claims its bytes, and no byte can be claimed twice. So a file leads
neither in circles nor twice to one place, and the work is bounded by its size.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from opt_core.checkpoints.sources import FileSource
from opt_core.errors import FormatError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
UNDEFINED = 2**64 - 1
"""The address of what was never allocated."""

AGAIN = "The file is damaged or its download incomplete: fetch it again."
REWRITE = "Write the file again with h5py's defaults, or with h5repack."

_MAX_PIECES = 2**16
_MAX_PIECE = 2**24
_MAX_NAME = 1024
_MAX_DEPTH = 64
_MAX_HEAP_TEXT = 64

_SUPERBLOCK = struct.Struct("<8sBBBxBBBxHHI")
_ADDRESSES = struct.Struct("<QQQQQQ")  # base, free space, end, driver; root: name, header
_HEADER = struct.Struct("<BxHII4x")  # version, messages, references, size
_MESSAGE = struct.Struct("<HHB3x")  # kind, size, flags
_RANGE = struct.Struct("<QQ")  # two addresses, or an address and a length
_NODE = struct.Struct("<4sBBHQQ")  # signature, kind, level, children, left, right
_TABLE = struct.Struct("<4sBxH")  # signature, version, entries
_ENTRY = struct.Struct("<QQI4x16x")  # name, header, kind of entry
_HEAP = struct.Struct("<4sB3xQQQ")  # signature, version, size, free list, address of the names
_COLLECTION = struct.Struct("<4sB3xQ")  # signature, version, size
_HEAP_OBJECT = struct.Struct("<H6xQ")  # number, size
_NO_CACHE, _CACHED_GROUP = 0, 1  # kinds of entry; 2 is a soft link


class Kind(IntEnum):
    """Messages of an object header that matter here."""

    DATASPACE = 0x01
    LINK_INFO = 0x02
    DATATYPE = 0x03
    LINK = 0x06
    EXTERNAL = 0x07
    LAYOUT = 0x08
    FILTERS = 0x0B
    ATTRIBUTE = 0x0C
    CONTINUATION = 0x10
    SYMBOL_TABLE = 0x11


@dataclass(frozen=True)
class Message:
    """One message of an object header; `position` is where its data begin in the file."""

    kind: int
    shared: bool
    position: int
    data: bytes


@dataclass(frozen=True)
class Hdf5Object:
    """What a path of the file leads to."""

    where: str  # for error messages
    path: tuple[str, ...]
    messages: tuple[Message, ...]

    def has(self, *kinds: Kind) -> bool:
        return any(message.kind in kinds for message in self.messages)

    def one(self, kind: Kind) -> Message:
        """The only message of a kind; raises FormatError if there is none, or several."""
        found = [message for message in self.messages if message.kind == kind]
        if len(found) != 1 or found[0].shared:
            raise FormatError(
                f"{self.where}: expected one {kind.name.lower().replace('_', ' ')} of its own, "
                f"found {len(found)}{' shared' * any(m.shared for m in found)}. {AGAIN}"
            )
        return found[0]

    def unpack(self, layout: struct.Struct, data: bytes, offset: int = 0) -> tuple[int, ...]:
        """Fields of a message's data; raises FormatError where it is too short for them."""
        if offset + layout.size > len(data):
            raise FormatError(
                f"{self.where}: expected {layout.size} bytes of a message, found "
                f"{max(0, len(data) - offset)}. {AGAIN}"
            )
        return layout.unpack_from(data, offset)


class Hdf5File:
    """An open HDF5 file; raises FormatError wherever it is not what h5py writes by default."""

    def __init__(self, source: FileSource) -> None:
        self.source = source
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._texts: dict[int, dict[int, bytes]] = {}
        self._root = self._read_superblock()

    def datasets(self) -> Iterator[Hdf5Object]:
        """Yield everything that is no group, depth first, in the order of the names."""
        todo: list[tuple[tuple[str, ...], int]] = [((), self._root)]
        while todo:
            path, address = todo.pop()
            found = Hdf5Object(self._where(path), path, self._read_header(path, address))
            if found.has(Kind.LINK, Kind.LINK_INFO):
                raise FormatError(
                    f"{found.where}: expected a group of the old kind, found one of the newer "
                    f"(libver='latest', track_order, or an external link in it). {REWRITE}"
                )
            if not found.has(Kind.SYMBOL_TABLE):
                yield found
                continue
            if len(path) == _MAX_DEPTH:
                raise self._error(f"at most {_MAX_DEPTH} groups in one another", "more", path)
            addresses = found.unpack(_RANGE, found.one(Kind.SYMBOL_TABLE).data)
            members = [((*path, name), header) for name, header in self._members(path, *addresses)]
            todo.extend(reversed(members))

    def claim(self, start: int, length: int, what: str) -> None:
        """Take bytes for one use; raises FormatError if they are not there or already taken."""
        end = start + length
        if start < 0 or end > self.source.size:
            raise self._error(f"{what} at {start} to {end}", f"a file of {self.source.size} bytes")
        if not length:
            return
        place = bisect_right(self._starts, start)
        before = place and self._ends[place - 1] > start
        if before or (place < len(self._starts) and self._starts[place] < end):
            raise self._error(
                f"{what} at {start} to {end} on its own",
                "bytes that something else occupies (two names for one thing, or a circle)",
            )
        if len(self._starts) == _MAX_PIECES:
            raise self._error(f"at most {_MAX_PIECES} pieces", "more")
        self._starts.insert(place, start)
        self._ends.insert(place, end)

    def heap_text(self, address: int, number: int) -> bytes:
        """A short text of a global heap; b"" if it holds none of that number."""
        if address not in self._texts:
            self._texts[address] = self._read_collection(address)
        return self._texts[address].get(number, b"")

    def _read(self, start: int, length: int, what: str) -> bytes:
        if length > _MAX_PIECE:
            raise self._error(f"{what} of at most {_MAX_PIECE} bytes", f"{length}")
        self.claim(start, length, what)
        return self.source.read_bytes(start, length)

    def _read_superblock(self) -> int:
        """Check the superblock, note the widths of B-tree nodes, return the root's address."""
        head = self._read(0, _SUPERBLOCK.size, "the superblock")
        signature, version, *parts, offsets, lengths, leaf, inner, _ = _SUPERBLOCK.unpack(head)
        if signature == SIGNATURE and version in (2, 3):
            raise self._error(
                "the older file format (superblock 0 or 1)",
                f"superblock {version}, as libver='latest' writes it",
                advice=REWRITE,
            )
        if signature != SIGNATURE or version > 1 or any(parts) or (offsets, lengths) != (8, 8):
            raise self._error(
                "a superblock 0 or 1 with addresses of 8 bytes", f"{head[:16].hex(' ')}"
            )
        self._most_children, self._most_entries = 2 * inner, 2 * leaf
        start = _SUPERBLOCK.size + 4 * version
        addresses = self._read(start, _ADDRESSES.size, "the superblock")
        base, _, end, driver, _, root = _ADDRESSES.unpack(addresses)
        if end > self.source.size:
            raise self._error(f"{end} bytes by its superblock", f"{self.source.size}")
        if base or driver != UNDEFINED:
            raise self._error(
                "one file that begins at 0", "a user block, or one of several files", advice=REWRITE
            )
        return int(root)

    def _read_header(self, path: tuple[str, ...], address: int) -> tuple[Message, ...]:
        """Read the messages of an object header and of the blocks that continue it."""
        head = self._read(address, _HEADER.size, "an object header")
        version, expected, _, size = _HEADER.unpack(head)
        if head.startswith(b"OHDR"):
            raise self._error(
                "an object header of version 1",
                "a newer one, as libver='latest' or track_order write it",
                path,
                REWRITE,
            )
        if version != 1:
            raise self._error("an object header of version 1", f"{version}", path)
        messages: list[Message] = []
        blocks = [(address + _HEADER.size, size)]
        for start, length in blocks:  # grows while it is walked
            block = self._read(start, length, "an object header")
            for message in self._parse_block(path, block, start):
                messages.append(message)
                if message.kind == Kind.CONTINUATION and len(message.data) >= _RANGE.size:
                    blocks.append(_RANGE.unpack_from(message.data))
                if len(messages) > expected:
                    break
        if len(messages) != expected:
            raise self._error(f"{expected} messages", f"{len(messages)}", path)
        return tuple(messages)

    def _parse_block(self, path: tuple[str, ...], block: bytes, start: int) -> Iterator[Message]:
        offset = 0
        while offset < len(block):
            if offset + _MESSAGE.size > len(block):
                raise self._error("whole messages", "the end of their block", path)
            kind, size, flags = _MESSAGE.unpack_from(block, offset)
            offset += _MESSAGE.size
            if offset + size > len(block):
                raise self._error(f"a message of {size} bytes", "the end of its block", path)
            yield Message(kind, bool(flags & 2), start + offset, block[offset : offset + size])
            offset += size

    def _members(self, path: tuple[str, ...], tree: int, heap: int) -> Iterator[tuple[str, int]]:
        """Yield name and header address of each member of a group, walking its B-tree."""
        names = self._read_names(path, heap)
        seen: set[str] = set()
        todo: list[tuple[int, int | None]] = [(tree, None)]
        while todo:
            address, expected = todo.pop()
            signature, kind, level, used, _, _ = _NODE.unpack(
                self._read(address, _NODE.size, "a B-tree")
            )
            if signature != b"TREE" or kind or used > self._most_children:
                raise self._error("a B-tree of a group", f"{signature!r}", path)
            if expected is not None and level != expected:
                raise self._error(f"a B-tree node of level {expected}", f"{level}", path)
            keys = self._read(address + _NODE.size, 16 * used + 8, "a B-tree")
            children = [_RANGE.unpack_from(keys, 16 * i)[1] for i in range(used)]
            if level:
                todo.extend((child, level - 1) for child in reversed(children))
                continue
            for child in children:
                for position, header in self._entries(path, child):
                    name = self._name(path, names, position)
                    if name in seen:
                        raise self._error(f"{name!r} once", "it twice", path)
                    seen.add(name)
                    yield name, header

    def _entries(self, path: tuple[str, ...], address: int) -> Iterator[tuple[int, int]]:
        """Yield the position of the name, and the header address, of each entry of a table."""
        signature, version, used = _TABLE.unpack(self._read(address, _TABLE.size, "a symbol table"))
        if signature != b"SNOD" or version != 1 or used > self._most_entries:
            raise self._error("a symbol table of a group", f"{signature!r}", path)
        table = self._read(address + _TABLE.size, used * _ENTRY.size, "a symbol table")
        for position, header, kind in _ENTRY.iter_unpack(table):
            if kind not in (_NO_CACHE, _CACHED_GROUP):
                raise self._error("datasets and groups", "a link by name", path, REWRITE)
            yield position, header

    def _read_names(self, path: tuple[str, ...], address: int) -> bytes:
        signature, version, size, _, start = _HEAP.unpack(
            self._read(address, _HEAP.size, "the names of a group")
        )
        if signature != b"HEAP" or version:
            raise self._error("the names of a group", f"{signature!r}", path)
        return self._read(start, size, "the names of a group")

    def _name(self, path: tuple[str, ...], names: bytes, position: int) -> str:
        end = names.find(b"\0", position, position + _MAX_NAME)
        text = names[position:end] if end > position else b""
        if text in (b"", b".") or b"/" in text:
            raise self._error(f"a name of at most {_MAX_NAME} bytes", f"{text[:50]!r}", path)
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self._error("a name in UTF-8", f"{text[:50]!r}", path) from None

    def _read_collection(self, address: int) -> dict[int, bytes]:
        """Return the short objects of a global heap collection by number."""
        head = self._read(address, _COLLECTION.size, "a global heap")
        signature, version, size = _COLLECTION.unpack(head)
        if signature != b"GCOL" or version != 1 or size < _COLLECTION.size:
            raise self._error("a global heap", f"{signature!r}")
        body = self._read(address + _COLLECTION.size, size - _COLLECTION.size, "a global heap")
        texts: dict[int, bytes] = {}
        offset = 0
        while offset + _HEAP_OBJECT.size <= len(body):
            number, length = _HEAP_OBJECT.unpack_from(body, offset)
            if not number:  # free space, which is the last
                break
            offset += _HEAP_OBJECT.size
            if length <= _MAX_HEAP_TEXT:
                texts[number] = body[offset : offset + length]
            offset += length + -length % 8
        return texts

    def _where(self, path: tuple[str, ...]) -> str:
        return f"{self.source.path}: {'/'.join(path)[:200]!r}" if path else str(self.source.path)

    def _error(
        self, expected: str, found: str, path: tuple[str, ...] = (), advice: str = AGAIN
    ) -> FormatError:
        return FormatError(f"{self._where(path)}: expected {expected}, found {found}. {advice}")
