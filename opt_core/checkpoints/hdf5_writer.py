# SPDX-License-Identifier: Apache-2.0
"""Write `tf_model.h5` and Keras' `.weights.h5`: h5py lays the file out, then the values go in place.

h5py writes into memory only, where nothing can fail, and no values: a full disk would leave libhdf5
with a file that it can neither write nor close.

Hugging Face's TensorFlow models read one file by the lists of names in its attributes, and the files
of a sharded checkpoint, which have another structure, by a list of their own.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opt_core.checkpoints.hdf5_format import BFLOAT16, DTYPES
from opt_core.checkpoints.output import PositionedFile, TensorLike
from opt_core.checkpoints.tensors import ALIGNMENT
from opt_core.errors import InputError, UnsupportedError

SCOPE = "tfopt_for_causal_lm"
"""What TensorFlow calls the model around all weights; readers skip it, whatever it is."""

KERAS_VERSION = "2.15.0"
"""The Keras whose files `tf_model.h5` follows: the last one that wrote them."""

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.h5")
_PAGE = 4096
_MAX_ATTRIBUTE = 64512  # bytes, as in Keras; an object header holds 64 KiB


class _SparseFile(io.RawIOBase):
    """A file in memory that takes no room where nothing was written, as h5py wants one to be."""

    def __init__(self) -> None:
        self._pages: defaultdict[int, bytearray] = defaultdict(lambda: bytearray(_PAGE))
        self._position = 0
        self._size = 0

    def texts(self) -> dict[int, bytes]:
        """What was written, by position; its end is that of the file."""
        self._pages.setdefault((self._size - 1) // _PAGE, bytearray(_PAGE))
        return {n * _PAGE: bytes(page)[: self._size - n * _PAGE] for n, page in self._pages.items()}

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self._size = self._position if size is None else size
        return self._size

    def readinto(self, buffer: Any) -> int:
        out = memoryview(buffer)
        for page, start, part in self._parts(len(out)):
            out[part] = self._pages[page][start : start + part.stop - part.start]
        return len(out)

    def write(self, buffer: Any) -> int:
        data = memoryview(buffer)
        for page, start, part in self._parts(len(data)):
            self._pages[page][start : start + part.stop - part.start] = data[part]
        self._size = max(self._size, self._position)
        return len(data)

    def _parts(self, length: int) -> Iterator[tuple[int, int, slice]]:
        """Move on by `length` bytes: yield each page, the place in it, and which bytes belong there."""
        done = 0
        while done < length:
            page, start = divmod(self._position, _PAGE)
            count = min(length - done, _PAGE - start)
            yield page, start, slice(done, done + count)
            done += count
            self._position += count


def create_tf_hdf5(
    path: Path, infos: Sequence[TensorLike], metadata: Mapping[str, str]
) -> PositionedFile:
    """Begin a `tf_model.h5`, or one of several if its name says so; there is no room for metadata.

    Raises InputError and UnsupportedError as `create_keras_hdf5`.
    """
    names = [info.name for info in infos]
    if _SHARD.search(path.name):
        return _create(path, infos, names, lambda file: _write_list(file, "layer_names", names))
    layers = dict.fromkeys(name.partition("/")[0] for name in names)

    def describe(file: Any) -> None:
        file.attrs["backend"] = np.bytes_(b"tensorflow")
        file.attrs["keras_version"] = np.bytes_(KERAS_VERSION.encode())
        _write_list(file, "layer_names", layers)
        _write_list(file.create_group("top_level_model_weights"), "weight_names", [])
        for layer in layers:
            weights = [f"{SCOPE}/{name}" for name in names if name.startswith(f"{layer}/")]
            _write_list(file[layer], "weight_names", weights)

    places = [f"{name.partition('/')[0]}/{SCOPE}/{name}" for name in names]
    return _create(path, infos, places, describe)


def tf_index_key(name: str) -> str:
    """Spell a tensor's name as the index of several `tf_model.h5` does: behind the scope."""
    return f"{SCOPE}/{name}"


def create_keras_hdf5(
    path: Path, infos: Sequence[TensorLike], metadata: Mapping[str, str]
) -> PositionedFile:
    """Begin a `.weights.h5`, a whole model's or one of several; there is no room for metadata.

    Raises InputError for a dtype that the format has no place for and for names that exclude each
    other, UnsupportedError without h5py.
    """
    return _create(path, infos, [info.name for info in infos])


def keras_index_key(name: str) -> str:
    """Return what Keras' index of several files names: the group that holds the tensor."""
    return "/" + name.rpartition("/")[0]


def _create(
    path: Path,
    infos: Sequence[TensorLike],
    places: Iterable[str],
    describe: Callable[[Any], None] = lambda file: None,
) -> PositionedFile:
    """Begin a file with room for all tensors, each at its place among the groups."""
    try:
        import h5py
    except ImportError as error:
        raise UnsupportedError("Writing HDF5 needs h5py: pip install h5py.") from error
    positions: dict[str, int] = {}
    memory = _SparseFile()
    with h5py.File(
        memory, "w", libver="earliest", alignment_threshold=1, alignment_interval=ALIGNMENT
    ) as file:
        for info, place in zip(infos, places, strict=True):
            if info.dtype not in DTYPES:
                raise InputError(
                    f"{info.name}: expected one of {', '.join(map(str, DTYPES))}, found "
                    f"{info.dtype}. Convert the array first."
                )
            positions[info.name] = _reserve(h5py, file, place, info)
        describe(file)
    return PositionedFile(path, infos, memory.texts(), positions)


def _reserve(h5py: Any, file: Any, place: str, info: TensorLike) -> int:
    """Make a dataset whose values are not written, and return where they belong in the file."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # the same tensors make the same bytes
    brief = info.dtype == BFLOAT16  # HDF5 has none: Keras stores two bytes and says what they are
    kind = h5py.h5t.py_create(np.dtype("V2") if brief else info.dtype, logical=True)
    parents = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    parents.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(info.shape) if info.shape else h5py.h5s.create(h5py.h5s.SCALAR)
    try:
        dataset = h5py.h5d.create(file.id, place.encode(), kind, space, properties, parents)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"{info.name}: expected a name that stands beside the others, found one that cannot "
            f"({error})."
        ) from error
    if brief:
        h5py.Dataset(dataset).attrs["dtype"] = "bfloat16"
    return int(dataset.get_offset() or 0)  # none where there are no values


def _write_list(group: Any, name: str, texts: Iterable[str]) -> None:
    """Write an attribute as Keras does: in numbered parts if it were too long."""
    array = np.array([text.encode() for text in texts])
    parts = max(1, -(-array.nbytes // _MAX_ATTRIBUTE))
    if parts == 1:
        group.attrs[name] = array
        return
    rows = _MAX_ATTRIBUTE // array.itemsize
    for number, start in enumerate(range(0, len(array), rows)):
        group.attrs[f"{name}{number}"] = array[start : start + rows]
