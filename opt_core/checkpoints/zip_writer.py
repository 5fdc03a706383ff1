# SPDX-License-Identifier: Apache-2.0
"""A zip archive whose members are stored as they are, each at a multiple of 64 bytes.

So torch writes its files, to map tensors from them. The standard library cannot place a member,
nor take several in turns; the format is that of PKWARE's APPNOTE.TXT, with its zip64 extension.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from opt_core.checkpoints.output import Blocks, PositionedFile, TensorLike, checked, nbytes
from opt_core.checkpoints.tensors import ALIGNMENT

ZIP64 = 2**32 - 1
"""Bytes or a position from here on do not fit into the fields of the first zip."""

_FULL = 2**32 - 1  # in a field: look into the extension
_MANY = 2**16 - 1  # members
_DATE = 0x0021  # 1 January 1980: the same tensors make the same file
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_CRC = 14  # position of the checksum in a local header


@dataclass(frozen=True)
class _Member:
    """One file of an archive: the position of its header, its number of bytes, its checksum."""

    name: bytes
    position: int
    size: int
    crc: int = 0

    @property
    def _fields(self) -> tuple[int, ...]:
        """What both headers say alike: version, flags, method, time, date, checksum, sizes."""
        large = self.size >= ZIP64
        size = _FULL if large else self.size
        return 45 if large else 20, 0, 0, 0, _DATE, self.crc, size, size

    def local_header(self) -> bytes:
        """What stands before the bytes, padded so that they begin at a multiple of 64."""
        extra = b""
        if self.size >= ZIP64:
            extra = struct.pack("<2H2Q", 1, 16, self.size, self.size)
        end = self.position + _LOCAL.size + len(self.name) + len(extra) + 4
        padding = -end % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # as torch calls it
        fields = (*self._fields, len(self.name), len(extra))
        return _LOCAL.pack(b"PK\x03\x04", *fields) + self.name + extra

    def central_header(self) -> bytes:
        """What the directory at the end of the archive says."""
        far = self.position >= ZIP64
        large = [self.size, self.size] * (self.size >= ZIP64) + [self.position] * far
        extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
        lengths = (len(self.name), len(extra), 0, 0, 0, 0)
        position = _FULL if far else self.position
        header = _CENTRAL.pack(b"PK\x01\x02", 45, *self._fields, *lengths, position)
        return header + self.name + extra


class ZipFile(PositionedFile):
    """An archive of texts, known now, and tensors, to be written; by the names of members."""

    def __init__(self, path: Path, members: Mapping[str, bytes | TensorLike]) -> None:
        self._members: dict[str, _Member] = {}
        self._keys: dict[str, str] = {}  # names of tensors -> of members
        texts: dict[int, bytes] = {}
        positions: dict[str, int] = {}
        end = 0
        for name, content in members.items():
            text, size = (content, 0) if isinstance(content, bytes) else (b"", nbytes(content))
            member = _Member(name.encode(), end, len(text) + size, zlib.crc32(text))
            self._members[name] = member
            texts[end] = member.local_header() + text
            end += len(texts[end])
            if not isinstance(content, bytes):
                self._keys[content.name] = name
                positions[content.name] = end
                end += size
        self._end = end
        infos = [content for content in members.values() if not isinstance(content, bytes)]
        super().__init__(path, infos, texts, positions)

    def write(self, name: str, blocks: Blocks) -> None:
        crc = 0
        self._file.seek(self._positions[name])
        for block in checked(self._infos[name], blocks):
            self.put(block)
            crc = zlib.crc32(block.data, crc)
        key = self._keys[name]
        self._members[key] = replace(self._members[key], crc=crc)

    def finish(self) -> None:
        for member in self._members.values():
            self._file.seek(member.position + _CRC)
            self._file.write(struct.pack("<I", member.crc))
        self._file.seek(self._end)
        self._file.write(self._directory())
        super().finish()

    def _directory(self) -> bytes:
        headers = b"".join(member.central_header() for member in self._members.values())
        count, size, start = len(self._members), len(headers), self._end
        end = b""
        if count >= _MANY or start + size >= ZIP64:
            end = _END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
            end += _LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1)
            count, size, start = _MANY, _FULL, _FULL
        end += _END.pack(b"PK\x05\x06", 0, 0, count, count, size, start, 0)
        return headers + end
