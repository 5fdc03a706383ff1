# SPDX-License-Identifier: Apache-2.0
"""One array of a zarr store: a JSON text of its shape, and its values in equal chunks, a key each.

Both versions are read as tensorstore writes them for orbax: version 2 (`.zarray`), and version 3
(`zarr.json`) with or without shards, which are values that hold several chunks and end in an index.
Whatever else a zarr store may ask for (other codecs, filters, byte orders, objects) is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.checksums import crc32c
from opt_core.checkpoints.values import Value
from opt_core.checkpoints.zstd import decode_into
from opt_core.errors import FormatError
from opt_core.files import parse_json_object

DTYPES: dict[str, np.dtype[Any]] = {
    "<f8": np.dtype(np.float64),
    "<f4": np.dtype(np.float32),
    "<f2": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "<i8": np.dtype(np.int64),
    "<i4": np.dtype(np.int32),
    "<i2": np.dtype(np.int16),
    "|i1": np.dtype(np.int8),
    "<u8": np.dtype(np.uint64),
    "<u4": np.dtype(np.uint32),
    "<u2": np.dtype(np.uint16),
    "|u1": np.dtype(np.uint8),
    "|b1": np.dtype(np.bool_),
    "<c8": np.dtype(np.complex64),
}
"""As version 2 names them; version 3 takes the names of numpy and ml_dtypes."""

METADATA_2 = ".zarray"
METADATA_3 = "zarr.json"

_DTYPES_3 = {dtype.name: dtype for dtype in DTYPES.values()}
_METADATA_LIMIT = 2**20
_RANK_LIMIT = 32
_NO_CHUNK = 2**64 - 1
_AGAIN = "The checkpoint is damaged or its download incomplete: fetch it again."


@dataclass(frozen=True)
class Grid:
    """What the JSON text of an array says.

    Attributes:
        chunks: the shape of a chunk; those at the end are as large as the others.
        shards: the shape of what one value holds: a chunk, or with `sharded` several and an index.
        compressed: whether each chunk is a zstd frame.
        prefix, separator: how the key of a value is made from its position.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...]
    sharded: bool
    compressed: bool
    prefix: str
    separator: str

    @property
    def chunk_nbytes(self) -> int:
        """The number of bytes of a chunk."""
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def num_chunks(self) -> int:
        """The number of chunks."""
        return math.prod(-(-n // step) for n, step in zip(self.shape, self.chunks, strict=True))

    def key(self, place: tuple[int, ...]) -> str:
        """The key of the value at a position of the grid of values."""
        parts = [self.prefix] if self.prefix else []
        return self.separator.join([*parts, *map(str, place)]) or "0"


class ZarrArray:
    """The array `name` of the store `values`; `where` names it in messages.

    Raises FormatError for metadata that are damaged or ask for what is not read here, and unless
    each of its values is there.
    """

    def __init__(self, name: str, values: Mapping[str, Value], where: str) -> None:
        self._name = name
        self._values = values
        self._where = where
        self._index: tuple[Value, NDArray[np.uint64]] | None = None
        self.grid = self._read_metadata()
        self._check()

    def read_into(self, place: tuple[int, ...], out: NDArray[np.uint8]) -> None:
        """Fill `out` with the bytes of the chunk at a position of the grid of chunks."""
        value = self._chunk(place)
        if self.grid.compressed:
            decode_into(value, out, self._where)
        else:
            self._check_length(value)
            value.read_into(out)

    def _read_metadata(self) -> Grid:
        for filename, parse in ((METADATA_2, _parse_2), (METADATA_3, _parse_3)):
            value = self._values.get(f"{self._name}/{filename}")
            if value is None:
                continue
            if value.length > _METADATA_LIMIT:
                raise self._wrong(
                    f"{filename} of at most {_METADATA_LIMIT} bytes", f"{value.length}"
                )
            where = f"{self._where}: {filename}"
            try:
                return parse(parse_json_object(bytes(value.read()), where))
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise self._wrong(f"a {filename} such as orbax writes", _reason(error)) from error
        raise self._wrong(f"{METADATA_2} or {METADATA_3}", "neither")

    def _check(self) -> None:
        grid = self.grid
        counts = [-(-n // step) for n, step in zip(grid.shape, grid.shards, strict=True)]
        if math.prod(counts) > len(self._values):
            raise self._wrong(f"{math.prod(counts)} chunks", f"{len(self._values)} values at most")
        for place in itertools.product(*map(range, counts)):
            value = self._value(place)
            if grid.sharded:
                self._check_index_length(value)
            elif not grid.compressed:
                self._check_length(value)

    def _value(self, place: tuple[int, ...]) -> Value:
        key = f"{self._name}/{self.grid.key(place)}"
        if key not in self._values:
            raise self._wrong(f"the chunk {key}", "none")
        return self._values[key]

    def _chunk(self, place: tuple[int, ...]) -> Value:
        """Return where a chunk lies."""
        grid = self.grid
        if not grid.sharded:
            return self._value(place)
        per = [shard // chunk for shard, chunk in zip(grid.shards, grid.chunks, strict=True)]
        value = self._value(tuple(at // n for at, n in zip(place, per, strict=True)))
        inner = np.ravel_multi_index([at % n for at, n in zip(place, per, strict=True)], per)
        offset, length = map(int, self._shard_index(value)[inner])
        if offset == _NO_CHUNK or offset + length > value.length:
            raise self._wrong(f"the chunk {place} in its shard", "none")
        return value.part(offset, length)

    def _shard_index(self, value: Value) -> NDArray[np.uint64]:
        """Return offset and length of each chunk of a shard, [chunks, 2]; the last is kept."""
        if self._index is None or self._index[0] is not value:
            length = self._check_index_length(value)
            data = bytes(value.part(value.length - length, length).read())
            if crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
                raise self._wrong("the checksum of a shard's index", "another")
            self._index = (value, np.frombuffer(data[:-4], "<u8").reshape(-1, 2))
        return self._index[1]

    def _check_index_length(self, value: Value) -> int:
        length = 16 * (math.prod(self.grid.shards) // math.prod(self.grid.chunks)) + 4
        if length > value.length:
            raise self._wrong(f"an index of {length} bytes", f"a shard of {value.length}")
        return length

    def _check_length(self, value: Value) -> None:
        if value.length != self.grid.chunk_nbytes:
            raise self._wrong(
                f"{self.grid.chunk_nbytes} bytes for a chunk {self.grid.chunks}", f"{value.length}"
            )

    def _wrong(self, expected: str, found: str) -> FormatError:
        return FormatError(f"{self._where}: expected {expected}, found {found}. {_AGAIN}")


def metadata_2(dtype: np.dtype[Any], shape: tuple[int, ...], chunks: tuple[int, ...]) -> Any:
    """Return the content of `.zarray` for an array without compression; KeyError for its dtype."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    return {
        "zarr_format": 2,
        "shape": shape,
        "chunks": chunks,
        "dtype": codes[dtype],
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "order": "C",
        "dimension_separator": ".",
    }


def _parse_2(content: dict[str, Any]) -> Grid:
    """Read version 2; raises KeyError, TypeError and ValueError for what is wrong."""
    compressor = content["compressor"]
    _expect("zarr_format", content["zarr_format"], 2)
    _expect("order", content["order"], "C")
    _expect("filters", content.get("filters"), None)
    if compressor is not None:
        _expect("compressor", compressor["id"], "zstd")
    separator = content.get("dimension_separator", ".")
    _expect("dimension_separator", separator, ".", "/")
    shape, chunks = _lengths(content["shape"], 0), _lengths(content["chunks"], 1)
    dtype = _dtype(DTYPES, content["dtype"])
    return _grid(dtype, shape, chunks, chunks, False, compressor is not None, "", separator)


def _parse_3(content: dict[str, Any]) -> Grid:
    """Read version 3; raises KeyError, TypeError and ValueError for what is wrong."""
    _expect("zarr_format", content["zarr_format"], 3)
    _expect("node_type", content["node_type"], "array")
    _expect("storage_transformers", content.get("storage_transformers", []), [])
    _expect("chunk_grid", content["chunk_grid"]["name"], "regular")
    encoding = content["chunk_key_encoding"]
    _expect("chunk_key_encoding", encoding["name"], "default")
    separator = encoding.get("configuration", {}).get("separator", "/")
    _expect("separator", separator, ".", "/")
    shards = chunks = _lengths(content["chunk_grid"]["configuration"]["chunk_shape"], 1)
    codecs = content["codecs"]
    sharded = codecs[0]["name"] == "sharding_indexed"
    if sharded:
        _expect("number of codecs", len(codecs), 1)
        sharding = codecs[0]["configuration"]
        _expect("index_location", sharding.get("index_location", "end"), "end")
        _expect("index_codecs", _codec_names(sharding["index_codecs"]), ["bytes", "crc32c"])
        chunks = _lengths(sharding["chunk_shape"], 1)
        codecs = sharding["codecs"]
    names = _codec_names(codecs)
    _expect("codecs", names, ["bytes"], ["bytes", "zstd"])
    shape = _lengths(content["shape"], 0)
    dtype = _dtype(_DTYPES_3, content["data_type"])
    return _grid(dtype, shape, chunks, shards, sharded, len(names) == 2, "c", separator)


def _grid(
    dtype: np.dtype[Any], shape: tuple[int, ...], chunks: tuple[int, ...], *rest: Any
) -> Grid:
    grid = Grid(dtype, shape, chunks, *rest)
    if not len(shape) == len(chunks) == len(grid.shards):
        raise ValueError(f"a shape {shape} and chunks {chunks}")
    if any(shard % chunk for shard, chunk in zip(grid.shards, chunks, strict=True)):
        raise ValueError(f"shards {grid.shards} of chunks {chunks}")
    return grid


def _codec_names(codecs: Any) -> list[str]:
    for codec in codecs:
        if codec["name"] == "bytes":
            _expect("endian", codec.get("configuration", {}).get("endian", "little"), "little")
    return [codec["name"] for codec in codecs]


def _dtype(known: Mapping[str, np.dtype[Any]], code: Any) -> np.dtype[Any]:
    if not isinstance(code, str) or code not in known:
        raise ValueError(f"the dtype {str(code)[:50]!r}, none of {', '.join(known)}")
    return known[code]


def _lengths(value: Any, least: int) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) > _RANK_LIMIT
        or not all(type(length) is int and least <= length < 2**62 for length in value)
    ):
        raise ValueError(f"the lengths {str(value)[:100]}")
    return tuple(value)


def _expect(what: str, found: object, *allowed: object) -> None:
    if found not in allowed:
        raise ValueError(f"{what} {str(found)[:100]!r}")


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
