# SPDX-License-Identifier: Apache-2.0
"""The safetensors container: 8 bytes of header length, a JSON header, then the values without gaps.

The header is read by a strict parser of our own: it takes less code than the detour over the
safetensors library, says in each message what is wrong where, and refuses what the library lets
pass (a name twice). The tests hold the two against each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from opt_core.checkpoints.output import PositionedFile, TensorLike, nbytes
from opt_core.checkpoints.sources import FileSource
from opt_core.checkpoints.tensors import ALIGNMENT, LazyTensor, TensorInfo
from opt_core.errors import FormatError, InputError
from opt_core.files import JSON_LIMIT, parse_json_object

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}

_METADATA = "__metadata__"
_PREFIX = 8
_AGAIN = "The file is damaged or its download incomplete: fetch it again."


@dataclass(frozen=True)
class _Entry:
    """One tensor of a header: its description and its bytes, counted from the end of the header."""

    info: TensorInfo
    begin: int
    end: int


def matches(head: bytes) -> bool:
    """Tell from the first bytes of a file whether it means to be safetensors."""
    return head[_PREFIX : _PREFIX + 1] == b"{"


def read_safetensors(source: FileSource) -> tuple[list[LazyTensor], dict[str, str]]:
    """Return the tensors of a file in the order of their bytes, and the file's metadata.

    Raises FormatError if header and file contradict each other in any way.
    """
    header, start = _read_header(source)
    metadata = _check_metadata(header.pop(_METADATA, {}), source.path)
    entries = [_parse_entry(name, fields, source.path) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_cover(entries, source, start)
    return [LazyTensor(entry.info, source, start + entry.begin) for entry in entries], metadata


def _read_header(source: FileSource) -> tuple[dict[str, Any], int]:
    """Return the header and the position where the values begin."""
    length = int.from_bytes(source.read_bytes(0, _PREFIX), "little")
    if length > JSON_LIMIT:
        raise FormatError(
            f"{source.path}: expected a header of at most {JSON_LIMIT} bytes, found a length of "
            f"{length}. {_AGAIN}"
        )
    if _PREFIX + length > source.size:
        raise FormatError(
            f"{source.path}: expected a header of {length} bytes, found a file of {source.size} "
            f"bytes. {_AGAIN}"
        )
    text = source.read_bytes(_PREFIX, length)
    return parse_json_object(text, f"{source.path}: header"), _PREFIX + length


def _check_metadata(metadata: Any, file: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(
            f"{file}: expected {_METADATA} to map names to strings, found other things. {_AGAIN}"
        )
    return metadata


def _parse_entry(name: str, fields: Any, file: Path) -> _Entry:
    """Check one entry of the header by itself."""
    where = f"{file}: tensor {name!r}"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise FormatError(f"{where}: expected dtype, shape and data_offsets. {_AGAIN}")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise FormatError(
            f"{where}: expected a dtype of {', '.join(DTYPES)}, found {str(code)[:50]!r}. "
            "Convert the tensor to one of these where it was made."
        )
    if not isinstance(shape, list):
        raise FormatError(f"{where}: expected a list as shape, found {str(shape)[:50]}. {_AGAIN}")
    info = TensorInfo(name, DTYPES[code], tuple(shape), file)
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
        or not 0 <= offsets[0] <= offsets[1]
    ):
        raise FormatError(
            f"{where}: expected data_offsets [begin, end], found {str(offsets)[:100]}. {_AGAIN}"
        )
    if offsets[1] - offsets[0] != info.nbytes:
        raise FormatError(
            f"{where}: expected {info.nbytes} bytes for {code} {info.shape}, found "
            f"{offsets[1] - offsets[0]} in data_offsets {offsets}. {_AGAIN}"
        )
    return _Entry(info, *offsets)


def _check_cover(entries: list[_Entry], source: FileSource, start: int) -> None:
    """Check that the entries, in order, cover the bytes behind the header once and without gaps."""
    position = 0
    for entry in entries:
        if entry.begin != position:
            problem = "an overlap with" if entry.begin < position else "a hole after"
            raise FormatError(
                f"{source.path}: tensor {entry.info.name!r}: expected its values to begin at "
                f"{position}, found {entry.begin}: {problem} the tensor before it. {_AGAIN}"
            )
        position = entry.end
    if start + position != source.size:
        raise FormatError(
            f"{source.path}: expected {start + position} bytes by its header, found "
            f"{source.size}. {_AGAIN}"
        )


def create_safetensors(
    path: Path, infos: Sequence[TensorLike], metadata: Mapping[str, str]
) -> PositionedFile:
    """Begin a file; its tensors lie wide elements first, so that each is aligned to its own.

    Raises InputError as `write_header` does.
    """
    ordered = sorted(infos, key=lambda info: -info.dtype.itemsize)
    header = write_header(ordered, metadata)
    positions: dict[str, int] = {}
    position = len(header)
    for info in ordered:
        positions[info.name] = position
        position += nbytes(info)
    return PositionedFile(path, infos, {0: header}, positions)


def write_header(infos: Iterable[TensorLike], metadata: Mapping[str, str]) -> bytes:
    """Return the header for tensors stored one after another in the order given.

    It ends at a multiple of 64 bytes. Raises InputError for a name twice or reserved, for a dtype
    that the format does not know, and for metadata that are not strings.
    """
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise InputError(f"metadata: expected strings, found {dict(metadata)!r}.")
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    position = 0
    for info in infos:
        if info.name == _METADATA or info.name in header:
            raise InputError(
                f"expected names that differ, and not {_METADATA}: found {info.name!r}."
            )
        if info.dtype not in _CODES:
            raise InputError(
                f"{info.name}: expected one of the dtypes {', '.join(map(str, _CODES))}, found "
                f"{info.dtype}. Convert the array first."
            )
        end = position + nbytes(info)
        header[info.name] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(_PREFIX + len(text)) % ALIGNMENT)
    return len(text).to_bytes(_PREFIX, "little") + text
