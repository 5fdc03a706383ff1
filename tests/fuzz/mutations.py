# SPDX-License-Identifier: Apache-2.0
"""Changes that make a file lie: they know where a container keeps its lengths and instructions.

What they change looks whole otherwise, checksums included. `mutate` mixes them with those of edits.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import Any

from opt_core.checkpoints.checksums import crc32c
from tests.fuzz.edits import (
    GENERAL,
    Mutation,
    any_number,
    append,
    delete,
    duplicate,
    flip_bits,
    nudge_word,
    replace,
    set_address,
    set_byte,
    set_digits,
    splice,
    zip_files,
)

# --- text ---------------------------------------------------------------------------------------


def _set_header(random: Random, data: bytes) -> bytes:
    """Change the header of a safetensors file as JSON and its length with it."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        return data
    change = random.choice((set_digits, _change_json, flip_bits, append, delete))
    header = change(random, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


_VALUES = (None, True, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, 1e308, "", "x", "../x", "\ud800")
_VALUES += ("a\0b", "F32", "model.safetensors", [], [[]], {}, {"": 0}, [0] * 50, "y" * 5000)


def _change_json(random: Random, data: bytes) -> bytes:
    """Give one place of a JSON value another value, or key, or twice the same."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return set_digits(random, data)
    change_value(random, root, _VALUES)
    try:
        return json.dumps(root).encode()
    except (ValueError, RecursionError):
        return data


def change_value(random: Random, root: Any, values: Sequence[Any]) -> None:
    """Change one value or key somewhere within dictionaries and lists."""
    node = root
    while isinstance(node, (dict, list)) and node:
        key = random.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], (dict, list)) and random.random() < 0.8:
            node = node[key]
            continue
        match random.randrange(4):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[random.choice(("", "x", "__metadata__", "self", "a/b", f"{key}"))] = node[key]
            case _:
                node[key] = random.choice(values)
        return


# --- zip archives, pickles, msgpack -------------------------------------------------------------

_ZIP_FIELDS = {
    b"PK\x01\x02": ((6, 2), (8, 2), (10, 2), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)),
    b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x05\x06": ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    b"PK\x06\x06": ((4, 8), (24, 8), (32, 8), (40, 8), (48, 8)),
    b"PK\x06\x07": ((4, 4), (8, 8), (16, 4)),
}


def _set_zip_field(random: Random, data: bytes) -> bytes:
    signature = random.choice(list(_ZIP_FIELDS))
    found = [match.start() for match in re.finditer(re.escape(signature), data)]
    if not found:
        return data
    offset, size = random.choice(_ZIP_FIELDS[signature])
    place = random.choice(found) + offset
    old = int.from_bytes(data[place : place + size], "little")
    number = random.choice((any_number(random), old + random.choice((-1, 1, 8, 64)), len(data)))
    return replace(data, place, (number % 256**size).to_bytes(size, "little"))


def _rezip(random: Random, data: bytes) -> bytes:
    """Pack an archive anew: with its pickle changed, a member less or more, or another name."""
    members: dict[str, bytes] = {}
    with suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            if info.compress_type == zipfile.ZIP_STORED and info.file_size < 2**20:
                members[info.filename] = archive.read(info)
    if not members:
        return data
    pickles = [name for name in members if name.endswith("data.pkl")]
    name = random.choice(pickles if pickles and random.random() < 0.8 else list(members))
    match random.randrange(8):
        case 0:
            del members[name]
        case 1:
            members[random.choice((f"x/{name}", f"{name}x", "../x", name.upper()))] = members[name]
        case _:
            change = _change_pickle if name in pickles else flip_bits
            members[name] = change(random, members[name])
    return zip_files(members)


_CODES = [ord(opcode.code) for opcode in pickletools.opcodes]
_INTEGERS = {b"K": (1, 1), b"M": (1, 2), b"J": (1, 4), b"h": (1, 1), b"q": (1, 1), b"j": (1, 4)}


def _change_pickle(random: Random, data: bytes) -> bytes:
    """Change, repeat, drop or move instructions of a pickle; `data` may go on behind it."""
    starts = _instructions(data)
    if len(starts) < 2:
        return flip_bits(random, data)
    this, other = random.randrange(len(starts) - 1), random.randrange(len(starts) - 1)
    start, stop = starts[this], starts[this + 1]
    several = min(len(starts) - 1, other + random.randint(1, 8))
    match random.randrange(8):
        case 0:
            new = bytes([random.choice(_CODES)]) + data[start + 1 : stop]
        case 1:
            new = b""
        case 2:
            new = data[start:stop] * random.choice((2, 3, 50))
        case 3:
            new = data[starts[other] : starts[several]]
        case 4:
            new = random.choice((_long(random), b"K\0", b"N", b"}"))
        case 5 | 6:
            new = data[starts[other] : starts[other + 1]]
        case _:
            return _set_argument(random, data, starts)
    return data[:start] + new + data[stop:]


def _long(random: Random) -> bytes:
    """The instruction for an integer of any length, sometimes too long to be printed."""
    if random.random() < 0.2:
        return b"\x8b" + struct.pack("<I", 3000) + b"\x7f" * 3000
    data = any_number(random).to_bytes(9, "little")
    return b"\x8a" + bytes([len(data)]) + data


def _instructions(data: bytes) -> list[int]:
    """Where the instructions of the pickles that a file begins with are."""
    stream = io.BytesIO(data)
    starts: list[int] = []
    with suppress(ValueError, IndexError, KeyError, EOFError, OverflowError, struct.error):
        while len(starts) < 20_000:
            for _, _, place in pickletools.genops(stream):
                starts.append(place or 0)
    return starts


def _set_argument(random: Random, data: bytes, starts: Sequence[int]) -> bytes:
    """Change the number behind an instruction that has one."""
    found = [start for start in starts if data[start : start + 1] in _INTEGERS]
    if not found:
        return data
    start = random.choice(found)
    offset, size = _INTEGERS[data[start : start + 1]]
    number = random.choice((any_number(random), random.randrange(20)))
    return replace(data, start + offset, (number % 256**size).to_bytes(size, "little"))


def _set_msgpack_length(random: Random, data: bytes) -> bytes:
    """Change what may be the head of a value: its kind, or its length."""
    found = [place for place, byte in enumerate(data[:4000]) if 0x80 <= byte <= 0xDF]
    if not found:
        return data
    place = random.choice(found)
    if random.random() < 0.4:
        return replace(data, place, bytes([random.choice(range(0x80, 0xE0))]))
    size = random.choice((1, 2, 4))
    old = int.from_bytes(data[place + 1 : place + 1 + size], "big")
    number = random.choice((any_number(random), old + random.choice((-1, 1, 4)), len(data)))
    return replace(data, place + 1, (number % 256**size).to_bytes(size, "big"))


_OCDBT = (b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde")


def _change_ocdbt(random: Random, data: bytes) -> bytes:
    """Change a manifest or node of a database, and its checksum with it."""
    starts = [match.start() for magic in _OCDBT for match in re.finditer(re.escape(magic), data)]
    if not starts:
        return data
    start = random.choice(starts)
    stop = start + int.from_bytes(data[start + 4 : start + 12], "little")
    body = data[start + 12 : stop - 4]
    if not 0 < len(body) < 10_000:
        return data
    change = random.choice((flip_bits, set_byte, set_byte, nudge_word, delete, duplicate))
    body = change(random, body)
    node = data[start : start + 4] + (len(body) + 16).to_bytes(8, "little") + body
    return data[:start] + node + crc32c(node).to_bytes(4, "little") + data[stop:]


_SAFETENSORS = (_set_header, _set_header, set_digits)
_JSON = (_change_json, _change_json, set_digits)
_MSGPACK = (_set_msgpack_length,)
_SPECIAL: dict[bytes, tuple[Mutation, ...]] = {
    b"PK": (_set_zip_field, _set_zip_field, _rezip, _rezip, _rezip),
    b"\x80": (_change_pickle,),
    b"\x89HDF": (set_address,),
    **dict.fromkeys(_OCDBT, (_change_ocdbt,)),
}


def mutate(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Change a file once or several times; `others` are files to take pieces from."""
    special = _special(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that take damaged files apart here
        for _ in range(random.choice((1, 1, 1, 2, 2, 3, 6))):
            if random.random() < 0.08:
                data = splice(random, data, random.choice(others))
            else:
                pool = special if random.random() < 0.6 else GENERAL
                data = random.choice(pool)(random, data)
    return data


def _special(data: bytes) -> tuple[Mutation, ...]:
    """The mutations made for a kind of file."""
    for start, mutations in _SPECIAL.items():
        if data.startswith(start):
            return mutations
    if data[8:9] == b"{":
        return _SAFETENSORS
    if data[:1] in (b"{", b"["):
        return _JSON
    if any(magic in data for magic in _OCDBT):
        return (_change_ocdbt,)
    return _MSGPACK
