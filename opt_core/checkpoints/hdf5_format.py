# SPDX-License-Identifier: Apache-2.0
"""The container of TensorFlow's `tf_model.h5` and of Keras' `.weights.h5`, read without libhdf5.

libhdf5 is no reader for files of strangers: damaged ones have made it write beyond its memory time
and again. So the little that such files need is read here: datasets of plain values in one piece,
which are left in the file until they are asked for.
"""

from __future__ import annotations

import struct
from typing import Any

import ml_dtypes
import numpy as np

from opt_core.checkpoints.hdf5_file import (
    AGAIN,
    REWRITE,
    SIGNATURE,
    UNDEFINED,
    Hdf5File,
    Hdf5Object,
    Kind,
)
from opt_core.checkpoints.sources import FileSource
from opt_core.checkpoints.tensors import LazyTensor, TensorInfo
from opt_core.errors import FormatError


def _integer(dtype: np.dtype[Any]) -> bytes:
    """Encode a little-endian integer type as a datatype message (specification: IV.A.2.d)."""
    signed = 8 if dtype.kind == "i" else 0
    return struct.pack("<BBHIHH", 0x10, signed, 0, dtype.itemsize, 0, 8 * dtype.itemsize)


def _float(dtype: np.dtype[Any], exponent: int) -> bytes:
    """Encode a little-endian IEEE type with so many bits of exponent as a datatype message."""
    bits = 8 * dtype.itemsize
    fraction, bias = bits - 1 - exponent, 2 ** (exponent - 1) - 1
    head = struct.pack("<BBBxI", 0x11, 0x20, bits - 1, dtype.itemsize)
    return head + struct.pack("<HHBBBBI", 0, bits, fraction, exponent, 0, fraction, bias)


BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
DTYPES: dict[np.dtype[Any], bytes] = {
    **{np.dtype(t): _integer(np.dtype(t)) for t in ("i1", "i2", "i4", "i8")},
    **{np.dtype(t): _integer(np.dtype(t)) for t in ("u1", "u2", "u4", "u8")},
    np.dtype(np.float16): _float(np.dtype(np.float16), 5),
    np.dtype(np.float32): _float(np.dtype(np.float32), 8),
    np.dtype(np.float64): _float(np.dtype(np.float64), 11),
    BFLOAT16: _float(BFLOAT16, 8),
    # h5py's bool: an enumeration of int8 with the members FALSE and TRUE
    np.dtype(np.bool_): struct.pack("<BBHI", 0x18, 2, 0, 1)
    + _integer(np.dtype("i1"))
    + b"FALSE\0\0\0TRUE\0\0\0\0\0\1",
}
"""Every dtype that can be read, and its datatype message as libhdf5 writes it, but for padding."""

_OPAQUE_2 = struct.pack("<BBHI", 0x15, 0, 0, 2)  # bfloat16 in Keras' files, by an attribute "dtype"
_DATATYPES = {code: dtype for dtype, code in DTYPES.items()}

_DATASPACE = struct.Struct("<BBBB")  # version, rank, flags; of version 2: kind
_LAYOUT = struct.Struct("<BB")  # version, class
_CONTIGUOUS = struct.Struct("<QQ")  # address, length
_COMPACT = struct.Struct("<H")  # length
_ATTRIBUTE = struct.Struct("<BxHHH")  # version, lengths of name, datatype, dataspace
_VARIABLE = struct.Struct("<IQI")  # length, address of the heap, number in it
_STRING, _VARIABLE_STRING = 3, (9, 1)


def matches(head: bytes) -> bool:
    """Tell from the first bytes of a file whether it means to be HDF5."""
    return head.startswith(SIGNATURE)


def read_hdf5(source: FileSource) -> tuple[list[LazyTensor], dict[str, str]]:
    """Return the datasets of a file, depth first in the order of their names, and no metadata.

    In TensorFlow's files each weight stands under its layer's name and the model's scope; these two
    are left out of its name. Raises FormatError for whatever h5py would not write by default (chunks,
    compression, links, newer versions of the format), and for files that contradict themselves.
    """
    file = Hdf5File(source)
    tensors: dict[str, LazyTensor] = {}
    for dataset in file.datasets():
        name = _weight_name(dataset.path)
        if name in tensors:
            raise FormatError(f"{dataset.where}: expected {name!r} once, found it twice. {AGAIN}")
        tensors[name] = _read_dataset(file, dataset, name)
    return list(tensors.values()), {}


def _weight_name(path: tuple[str, ...]) -> str:
    """Spell a name: `model/tfopt_model/model/decoder/fc1/kernel:0` without its first two parts."""
    scoped = len(path) > 3 and path[0] == path[2] and path[-1].endswith(":0")
    return "/".join(path[2:] if scoped else path)


def _read_dataset(file: Hdf5File, dataset: Hdf5Object, name: str) -> LazyTensor:
    where = dataset.where
    if dataset.has(Kind.FILTERS):
        raise FormatError(f"{where}: expected plain values, found compressed ones. {REWRITE}")
    if dataset.has(Kind.EXTERNAL):
        raise FormatError(
            f"{where}: expected values in this file, found a reference to another. Nothing was "
            "opened; do not trust this checkpoint."
        )
    info = TensorInfo(name, _dtype(file, dataset), _shape(dataset), file.source.path)
    position, length = _place(file, dataset)
    if position == UNDEFINED and info.nbytes:
        raise FormatError(f"{where}: expected {info.nbytes} bytes, found no values. {AGAIN}")
    if length != info.nbytes:
        raise FormatError(
            f"{where}: expected {info.nbytes} bytes for {info.dtype} {info.shape}, found {length}. "
            f"{AGAIN}"
        )
    return LazyTensor(info, file.source, position if length else 0)


def _shape(dataset: Hdf5Object) -> tuple[int, ...]:
    """Read a dataspace message (specification: IV.A.2.b)."""
    data = dataset.one(Kind.DATASPACE).data
    version, rank, _, kind = dataset.unpack(_DATASPACE, data)
    if version not in (1, 2) or (version == 2 and kind != (1 if rank else 0)):
        raise FormatError(
            f"{dataset.where}: expected an array or a scalar, found dataspace {data[:8].hex(' ')}. "
            f"{AGAIN}"
        )
    return dataset.unpack(struct.Struct(f"<{rank}Q"), data, 8 if version == 1 else 4)


def _dtype(file: Hdf5File, dataset: Hdf5Object) -> np.dtype[Any]:
    data = dataset.one(Kind.DATATYPE).data
    if data.startswith(_OPAQUE_2) and _text_attribute(file, dataset, b"dtype") == b"bfloat16":
        return BFLOAT16
    for code, dtype in _DATATYPES.items():
        if data.startswith(code):
            return dtype
    raise FormatError(
        f"{dataset.where}: expected one of {', '.join(map(str, DTYPES))} in little-endian order, "
        f"found datatype {data[:24].hex(' ')}. Convert the values where they were made."
    )


def _place(file: Hdf5File, dataset: Hdf5Object) -> tuple[int, int]:
    """Return position and length of the values (specification: IV.A.2.i)."""
    message = dataset.one(Kind.LAYOUT)
    layout = dataset.unpack(_LAYOUT, message.data)
    if layout == (3, 0):
        (length,) = dataset.unpack(_COMPACT, message.data, _LAYOUT.size)
        offset = _LAYOUT.size + _COMPACT.size
        if offset + length > len(message.data):
            raise FormatError(
                f"{dataset.where}: expected {length} bytes in its header, found "
                f"{len(message.data) - offset}. {AGAIN}"
            )
        return message.position + offset, length
    if layout != (3, 1):
        raise FormatError(
            f"{dataset.where}: expected values in one piece (layout 3, compact or contiguous), found "
            f"layout {layout[0]}, class {layout[1]}: chunks, or a newer format. {REWRITE}"
        )
    position, length = dataset.unpack(_CONTIGUOUS, message.data, _LAYOUT.size)
    if position != UNDEFINED:
        file.claim(position, length, f"the values of {'/'.join(dataset.path)[:200]!r}")
    return position, length


def _text_attribute(file: Hdf5File, dataset: Hdf5Object, wanted: bytes) -> bytes:
    """Return a short text that is an attribute of a dataset; b"" if there is none of that name."""
    for message in dataset.messages:
        if message.kind != Kind.ATTRIBUTE:
            continue
        data = message.data
        version, *lengths = dataset.unpack(_ATTRIBUTE, data)
        # Version 1 rounds each part up to 8 bytes, version 3 names the encoding first.
        step, start = (8, 8) if version == 1 else (1, 9 if version == 3 else 8)
        name, datatype, dataspace = (length + -length % step for length in lengths)
        if data[start : start + lengths[0]] != wanted + b"\0":
            continue
        kind = dataset.unpack(struct.Struct("<BB"), data, start + name)
        value = data[start + name + datatype + dataspace :]
        if kind[0] & 15 == _STRING:
            return value.rstrip(b"\0 ")
        if (kind[0] & 15, kind[1] & 15) == _VARIABLE_STRING:
            length, address, number = dataset.unpack(_VARIABLE, value)
            return file.heap_text(address, number)[:length]
    return b""
