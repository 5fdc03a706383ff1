# SPDX-License-Identifier: Apache-2.0
"""Changes that damage any file: each draws where and what from the generator given."""

from __future__ import annotations

import gzip
import io
import re
import zipfile
from collections.abc import Callable
from random import Random

Mutation = Callable[[Random, bytes], bytes]

_EDGES = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**24, 2**30)
_EDGES += (2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def truncate(random: Random, data: bytes) -> bytes:
    return data[: random.randint(0, len(data))]


def flip_bits(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8)) if data else 0):
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def set_byte(random: Random, data: bytes) -> bytes:
    return replace(data, any_place(random, data), bytes([any_number(random) & 0xFF]))


def set_word(random: Random, data: bytes) -> bytes:
    size = random.choice((2, 4, 8))
    order = random.choice(("little", "big"))
    number = (any_number(random) % 256**size).to_bytes(size, order)
    return replace(data, any_place(random, data), number)


def nudge_word(random: Random, data: bytes) -> bytes:
    """Add a little to a number that may be a length or an address."""
    size = random.choice((1, 2, 4, 8))
    place = any_place(random, data)
    old = int.from_bytes(data[place : place + size], "little")
    number = (old + random.choice((-8, -1, 1, 8, len(data)))) % 256**size
    return replace(data, place, number.to_bytes(size, "little"))


def delete(random: Random, data: bytes) -> bytes:
    start, stop = any_block(random, data)
    return data[:start] + data[stop:]


def duplicate(random: Random, data: bytes) -> bytes:
    start, stop = any_block(random, data)
    return data[:stop] + data[start:stop] * random.choice((1, 1, 3)) + data[stop:]


def copy(random: Random, data: bytes) -> bytes:
    start, stop = any_block(random, data)
    return replace(data, any_place(random, data), data[start:stop])


def insert(random: Random, data: bytes) -> bytes:
    place = any_place(random, data)
    return data[:place] + random.randbytes(random.choice((1, 4, 8, 64))) + data[place:]


def append(random: Random, data: bytes) -> bytes:
    return data + random.choice((b"\0", random.randbytes(30), data[:200], bytes(2000)))


def wrap(random: Random, data: bytes) -> bytes:
    """Put the file into an archive, or a number of zeros before it."""
    match random.randrange(3):
        case 0:
            return gzip.compress(data, 1, mtime=0)
        case 1:
            return zip_files({"archive/data.pkl": data, "archive/data/0": data})
    return bytes(2 ** random.randint(0, 9)) + data


def splice(random: Random, data: bytes, other: bytes) -> bytes:
    """Go on with a piece of another file, or put it in place of one of this."""
    place = any_place(random, data)
    start, stop = any_block(random, other)
    return random.choice((data[:place] + other[start:], replace(data, place, other[start:stop])))


def any_number(random: Random) -> int:
    return random.choice(_EDGES) if random.random() < 0.8 else random.getrandbits(64)


def any_place(random: Random, data: bytes) -> int:
    """A position, half of the time in the first part, where most files keep their structure."""
    return random.randrange(max(1, len(data) if random.random() < 0.5 else min(len(data), 600)))


def any_block(random: Random, data: bytes) -> tuple[int, int]:
    start = any_place(random, data)
    return start, start + random.choice((1, 2, 4, 8, 16, 60, 500))


def replace(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def set_address(random: Random, data: bytes) -> bytes:
    """Change an aligned number that could be a length or an address in the file for another."""
    step = random.choice((8, 8, 4, 2))
    places = [
        place
        for place in range(0, len(data) - step + 1, step)
        if 0 < int.from_bytes(data[place : place + step], "little") <= 2 * len(data)
    ]
    if not places:
        return data
    place, other = random.choice(places), random.choice(places)
    new = random.choice(
        (
            data[other : other + step],
            (any_number(random) % 256**step).to_bytes(step, "little"),
            (random.randrange(len(data)) // 8 * 8 % 256**step).to_bytes(step, "little"),
        )
    )
    return replace(data, place, new)


def set_digits(random: Random, data: bytes) -> bytes:
    """Change a number in a text for another, of any length."""
    found = list(re.finditer(rb"\d+", data[:20_000]))
    if not found:
        return data
    digits = random.choice(found)
    new = random.choice(
        (str(any_number(random)), "-1", "1e400", "1.5", "9" * 5000, "[" * 2000, "true")
    )
    return data[: digits.start()] + new.encode() + data[digits.end() :]


def zip_files(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return stream.getvalue()


GENERAL: tuple[Mutation, ...] = (
    *(truncate, flip_bits, set_byte, set_word, nudge_word, delete),
    *(duplicate, copy, insert, append, wrap),
)
