# SPDX-License-Identifier: Apache-2.0
"""The container of `torch.save` (`pytorch_model.bin`), read without torch.

Since torch 1.6 it is a zip archive: `data.pkl` describes the state dict, each storage is an
uncompressed member `data/KEY`. Before, it was one stream: three small pickles (a magic number, the
protocol, the byte order), the state dict, the list of storage keys, then each storage behind its
length. In both, tensors are views onto storages and are left in the file until they are asked for.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opt_core.checkpoints.sources import FileSource
from opt_core.checkpoints.tensors import LazyTensor, TensorInfo, element_span
from opt_core.checkpoints.torch_objects import load_objects
from opt_core.checkpoints.torch_pickle import (
    MAX_PICKLE,
    Storage,
    StoredTensor,
    Unpickled,
    load_pickle,
)
from opt_core.errors import FormatError

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field

_Load = Callable[[io.BytesIO, str], Unpickled]
_Places = dict[str, tuple[int, int]]
_AGAIN = "The file is damaged or its download incomplete: fetch it again."


def matches(head: bytes) -> bool:
    """Tell from the first 512 bytes of a file whether torch wrote it."""
    return head.startswith((_ZIP, _PICKLE)) or _is_tar(head)


def read_torch(source: FileSource) -> tuple[list[LazyTensor], dict[str, str]]:
    """Return the tensors of a state dict in its order, and no metadata: the format has none.

    Entries that are no tensors are left out. Raises FormatError if the file is damaged, contradicts
    itself, or asks for anything that a state dict does not need.
    """
    state, places = _read(source, load_pickle)
    if not isinstance(state, dict):
        raise FormatError(
            f"{source.path}: expected a state dict (names and tensors), found a "
            f"{type(state).__name__}. Save model.state_dict()."
        )
    tensors = {name: value for name, value in state.items() if isinstance(value, StoredTensor)}
    if not tensors:
        raise FormatError(
            f"{source.path}: expected a state dict (names and tensors), found no tensor under its "
            f"{len(state)} entries {str(list(state)[:5])[:200]}. Save model.state_dict(), not a "
            "dictionary around it."
        )
    return [_place(name, tensor, source, places) for name, tensor in tensors.items()], {}


def read_pickled(source: FileSource) -> tuple[Any, Callable[[str, StoredTensor], LazyTensor]]:
    """Return all that a file of a training run holds, and what makes a stored tensor readable.

    Objects other than tensors are records of torch_objects.Inert; keys of dictionaries are strings.
    The function takes a name and a StoredTensor found in the value. Raises FormatError as
    `read_torch` does, from the function too.
    """
    value, places = _read(source, load_objects)
    return value, lambda name, tensor: _place(name, tensor, source, places)


def _read(source: FileSource, load: _Load) -> tuple[Any, _Places]:
    head = source.read_bytes(0, 512)
    if _is_tar(head):
        raise FormatError(
            f"{source.path}: expected a file of torch 0.4 or newer, found a tar archive as older "
            "ones wrote. Load it with torch and save it again."
        )
    return (_read_zip if head.startswith(_ZIP) else _read_legacy)(source, load)


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _place(name: str, tensor: StoredTensor, source: FileSource, places: _Places) -> LazyTensor:
    """Tie a tensor to the bytes of its storage; `places` gives offset and length of each."""
    where = f"{source.path}: tensor {name!r}"
    storage = tensor.storage
    if tensor.marks:
        raise FormatError(
            f"{where}: expected plain values, found a view marked {', '.join(tensor.marks)!r:.100}: "
            "torch computes other values than the file stores. Load the file with torch and save "
            "tensor.resolve_conj().resolve_neg()."
        )
    info = TensorInfo(name, storage.dtype, tensor.shape, source.path)
    if storage.key not in places:
        raise FormatError(f"{where}: expected a storage {storage.key[:50]!r}, found none. {_AGAIN}")
    start, length = places[storage.key]
    if length != storage.numel * storage.dtype.itemsize:
        raise FormatError(
            f"{where}: expected a storage of {storage.numel} {storage.dtype}, found {length} "
            f"bytes. {_AGAIN}"
        )
    inside = tensor.offset >= 0 and all(stride >= 0 for stride in tensor.strides)
    end = tensor.offset + element_span(tensor.shape, tensor.strides) if inside else 0
    if not inside or end > storage.numel or info.size > storage.numel:
        raise FormatError(
            f"{where}: expected a tensor within its storage of {storage.numel} elements, found "
            f"offset {tensor.offset}, shape {tensor.shape}, strides {tensor.strides}. {_AGAIN}"
        )
    strides = None if _is_contiguous(tensor) else tensor.strides
    return LazyTensor(info, source, start + tensor.offset * storage.dtype.itemsize, strides)


def _is_contiguous(tensor: StoredTensor) -> bool:
    expected = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if length > 1 and stride != expected:
            return 0 in tensor.shape
        expected *= length
    return True


def _read_zip(source: FileSource, load: _Load) -> tuple[Any, _Places]:
    """Return the state dict and the place of each storage of a zip archive."""
    members = _zip_members(source)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise FormatError(
            f"{source.path}: expected a zip archive of torch with one data.pkl, found "
            f"{len(pickles)} among {len(members)} members {str(list(members)[:5])[:200]}. Is this "
            "a checkpoint?"
        )
    root = pickles[0].removesuffix("data.pkl")
    order = members.get(root + "byteorder")
    if order is not None and source.read_bytes(order[0], min(order[1], 16)) != b"little":
        raise _big_endian(source.path)
    start, length = members[pickles[0]]
    if length > MAX_PICKLE:
        raise FormatError(
            f"{source.path}: expected a data.pkl of at most {MAX_PICKLE} bytes, found {length}."
        )
    state = load(io.BytesIO(source.read_bytes(start, length)), str(source.path))
    prefix = root + "data/"
    return state.value, {
        name.removeprefix(prefix): place
        for name, place in members.items()
        if name.startswith(prefix)
    }


def _zip_members(source: FileSource) -> dict[str, tuple[int, int]]:
    """Return offset and length of each member; only whole, plainly stored members pass."""
    try:
        with zipfile.ZipFile(source.file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OSError) as error:
        raise FormatError(
            f"{source.path}: expected a whole zip archive, found a broken one ({error}). {_AGAIN}"
        ) from error
    members: dict[str, tuple[int, int]] = {}
    for entry in entries:
        where = f"{source.path}: member {entry.filename!r}"
        if entry.filename in members:
            raise FormatError(f"{where}: expected it once, found it twice. Do not trust the file.")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise FormatError(
                f"{where}: expected plain bytes, as torch writes them, found it compressed or "
                "encrypted. Save the file with torch again."
            )
        members[entry.filename] = _member_place(source, entry, where)
    return members


def _member_place(source: FileSource, entry: zipfile.ZipInfo, where: str) -> tuple[int, int]:
    header = source.read_bytes(max(entry.header_offset, 0), _LOCAL_HEADER.size)
    if entry.header_offset < 0 or len(header) < _LOCAL_HEADER.size or header[:4] != _ZIP:
        raise FormatError(
            f"{where}: expected its header at {entry.header_offset}, found none. {_AGAIN}"
        )
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if entry.compress_size != entry.file_size or start + entry.file_size > source.size:
        raise FormatError(
            f"{where}: expected {entry.file_size} bytes from {start} on, found a file of "
            f"{source.size} bytes. {_AGAIN}"
        )
    return start, entry.file_size


def _read_legacy(source: FileSource, load: _Load) -> tuple[Any, _Places]:
    """Return the state dict and the place of each storage of a stream older than torch 1.6."""
    where = str(source.path)
    stream = io.BytesIO(source.read_bytes(0, MAX_PICKLE))
    if load_pickle(stream, where).value != _LEGACY_MAGIC:
        raise FormatError(
            f"{where}: expected the magic number of torch.save, found another pickle. Is this a "
            "checkpoint?"
        )
    protocol, system = load_pickle(stream, where).value, load_pickle(stream, where).value
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise FormatError(
            f"{where}: expected torch's protocol {_LEGACY_PROTOCOL}, found another. {_AGAIN}"
        )
    if system.get("little_endian") is not True:
        raise _big_endian(source.path)
    state, keys = load(stream, where), load_pickle(stream, where).value
    return state.value, _legacy_places(source, state.storages, keys, stream.tell())


def _legacy_places(
    source: FileSource, storages: dict[str, Storage], keys: Any, position: int
) -> _Places:
    """Walk over the storages behind the pickles: each is its number of elements, then its bytes."""
    places: _Places = {}
    for key in keys if isinstance(keys, list) else [None]:
        if not isinstance(key, str) or key not in storages or key in places:
            raise FormatError(
                f"{source.path}: expected a list of the keys of {len(storages)} storages, found "
                f"another. {_AGAIN}"
            )
        storage = storages[key]
        numel = int.from_bytes(source.read_bytes(position, 8), "little", signed=True)
        length = storage.numel * storage.dtype.itemsize
        position += 8
        if numel != storage.numel or position + length > source.size:
            raise FormatError(
                f"{source.path}: expected a storage of {storage.numel} {storage.dtype} at "
                f"{position}, found {numel} elements and {source.size - position} bytes. {_AGAIN}"
            )
        places[key] = (position, length)
        position += length
    return places


def _big_endian(file: Path) -> FormatError:
    return FormatError(
        f"{file}: expected little-endian values, found big-endian ones. Load the file with torch "
        "on a machine like yours and save it again."
    )
