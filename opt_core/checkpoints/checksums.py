# SPDX-License-Identifier: Apache-2.0
"""CRC-32C, the checksum of the Castagnoli polynomial, which Python's own modules do not know."""

from __future__ import annotations


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of `data`: for headers and indices, a second for ten million bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _remainder(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_TABLE = tuple(map(_remainder, range(256)))
