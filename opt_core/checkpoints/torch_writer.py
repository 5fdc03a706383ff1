# SPDX-License-Identifier: Apache-2.0
"""The container of `torch.save` (`pytorch_model.bin`), written without torch.

A state dict of plain tensors, each on a storage of its own, as a zip archive or as the one stream
of torch before 1.6; see torch_format for what these are.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from opt_core.checkpoints.output import PositionedFile, TensorLike, nbytes
from opt_core.checkpoints.torch_format import _LEGACY_MAGIC, _LEGACY_PROTOCOL
from opt_core.checkpoints.torch_pickle import _STORAGES
from opt_core.checkpoints.zip_writer import ZipFile
from opt_core.errors import InputError

_CLASSES = {dtype: name for name, dtype in _STORAGES.items()}
_ROOT = "archive"  # what torch calls it when it does not know the file's name
_SYSTEM = {
    "protocol_version": _LEGACY_PROTOCOL,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


def create_torch_zip(
    path: Path, infos: Sequence[TensorLike], metadata: Mapping[str, str]
) -> ZipFile:
    """Begin a file as torch writes them since 1.6; the format has no room for metadata.

    Raises InputError for a dtype that torch does not know.
    """
    state = OrderedDict((info.name, _tensor(info, str(key))) for key, info in enumerate(infos))
    members: dict[str, bytes | TensorLike] = {
        f"{_ROOT}/data.pkl": _pickle(state),
        f"{_ROOT}/byteorder": b"little",
        **{f"{_ROOT}/data/{key}": info for key, info in enumerate(infos)},
        f"{_ROOT}/version": b"3\n",
    }
    return ZipFile(path, members)


def create_torch_legacy(
    path: Path, infos: Sequence[TensorLike], metadata: Mapping[str, str]
) -> PositionedFile:
    """Begin a file as torch wrote them before 1.6; the format has no room for metadata.

    Raises InputError for a dtype that torch does not know.
    """
    state = OrderedDict(
        (info.name, _tensor(info, str(key), None)) for key, info in enumerate(infos)
    )
    keys = [str(key) for key in range(len(infos))]
    pickles = (_LEGACY_MAGIC, _LEGACY_PROTOCOL, _SYSTEM, state, keys)
    texts = {0: b"".join(map(_pickle, pickles))}
    positions: dict[str, int] = {}
    end = len(texts[0])
    for info in infos:  # each storage: the number of its elements, then the elements
        texts[end] = struct.pack("<q", _numel(info))
        positions[info.name] = end + len(texts[end])
        end = positions[info.name] + nbytes(info)
    return PositionedFile(path, infos, texts, positions)


@dataclass(frozen=True)
class _Global:
    """Pickles as the name of something."""

    module: str
    name: str


@dataclass(frozen=True)
class _Call:
    """Pickles as a call."""

    function: _Global
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Stored:
    """Pickles as what is kept outside the pickle under that description."""

    description: tuple[Any, ...]


_ORDERED_DICT = _Global("collections", "OrderedDict")


def _tensor(info: TensorLike, key: str, *view: None) -> _Call:
    """Describe a tensor in C order on the storage `key`; `view` is what older torch adds."""
    if info.dtype not in _CLASSES:
        raise InputError(
            f"{info.name}: expected one of the dtypes {', '.join(map(str, _CLASSES))}, found "
            f"{info.dtype}. Convert the array first."
        )
    shape = tuple(info.shape)
    strides = tuple(accumulate((max(length, 1) for length in shape[:0:-1]), mul, initial=1))[::-1]
    storage = _Global(*_CLASSES[info.dtype].split("."))
    return _Call(
        _Global("torch._utils", "_rebuild_tensor_v2"),
        (
            _Stored(("storage", storage, key, "cpu", _numel(info), *view)),
            0,  # where in the storage it begins
            shape,
            strides[: len(shape)],
            False,  # requires_grad
            _Call(_ORDERED_DICT, ()),  # hooks
        ),
    )


def _numel(info: TensorLike) -> int:
    return nbytes(info) // info.dtype.itemsize


def _pickle(value: Any) -> bytes:
    """Pickle a value in protocol 2, as torch does."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    """Return instructions that put a value onto the stack; Python's own are in `pickletools`."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return _integer(value)
        case str():
            data = value.encode()
            return b"X" + struct.pack("<I", len(data)) + data
        case tuple():
            return b"(" + b"".join(map(_opcodes, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_opcodes, value)) + b"e"
        case dict():
            empty = _opcodes(_Call(_ORDERED_DICT, ())) if type(value) is OrderedDict else b"}"
            items = (_opcodes(key) + _opcodes(item) for key, item in value.items())
            return empty + b"(" + b"".join(items) + b"u"
        case _Global():
            return f"c{value.module}\n{value.name}\n".encode()
        case _Call():
            return _opcodes(value.function) + _opcodes(value.arguments) + b"R"
        case _Stored():
            return _opcodes(value.description) + b"Q"
    raise TypeError(f"a {type(value).__name__} has no place in a state dict")


def _integer(value: int) -> bytes:
    if 0 <= value < 2**8:
        return b"K" + struct.pack("<B", value)
    if 0 <= value < 2**16:
        return b"M" + struct.pack("<H", value)
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    length = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)
