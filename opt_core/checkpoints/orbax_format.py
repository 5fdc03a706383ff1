# SPDX-License-Identifier: Apache-2.0
"""Orbax, in which Flax programs keep parameters: a folder with a tree of names and a zarr store.

`_METADATA` tells the names, the arrays lie in plain folders or in an OCDBT database. Both are read
here and not through tensorstore, which trusts them: see `ocdbt`.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.ocdbt import MANIFEST, read_ocdbt
from opt_core.checkpoints.tensors import BLOCK, LazyTensor, TensorInfo, empty_aligned
from opt_core.checkpoints.values import Value, file_value, scan
from opt_core.checkpoints.zarr_format import ZarrArray
from opt_core.errors import FormatError
from opt_core.files import JSON_LIMIT, parse_json_object, plain_name

METADATA = "_METADATA"
FOLDERS = ("orbax", "params", "default")
"""Names under which the folder of the parameters stands in that of a model, in order."""

_ARRAYS = ("jax.Array", "np.ndarray")
_UNFINISHED = re.compile(r"^\.|\.orbax-checkpoint-tmp")
_SMALL = 2**25
_RATIO = 20  # of bytes declared to bytes stored; trained weights take at least half their size
_FEW = 1000
_MEAN = 64  # bytes stored for each compressed chunk: to decode one takes a while, however small


def find_orbax(path: str | os.PathLike[str]) -> Path | None:
    """Return the orbax directory that `path` is, or that stands in it; None if there is none.

    Of several in it, one must have a name of `FOLDERS`.
    """
    path = Path(path)
    for folder in (path, *(path / name for name in FOLDERS)):
        if os.path.isfile(folder / METADATA):
            return folder
    if not path.is_dir():
        return None
    inside = [folder for folder in path.iterdir() if os.path.isfile(folder / METADATA)]
    whole = [folder for folder in inside if not _UNFINISHED.search(folder.name)]
    return whole[0] if len(whole) == 1 else None


def read_orbax(directory: Path) -> tuple[list[LazyTensor], dict[str, str]]:
    """Return the arrays of an orbax directory, named with "." between keys, and its metadata.

    Leaves that are no arrays are passed over. Raises FormatError for a directory that is damaged,
    lies about itself, or reaches outside.
    """
    files = scan(directory)
    if METADATA not in files:
        raise FormatError(f"{directory}: expected {METADATA}, found none. Check the path.")
    tree = _read_tree(files[METADATA])
    if MANIFEST in files:
        values: Mapping[str, Value] = read_ocdbt(directory, files)
    else:
        values = {key: file_value(path) for key, path in files.items()}
    arrays = {
        name: ZarrArray(name, values, f"{directory}: {name}") for name in _names(tree, directory)
    }
    _check_claims(directory, arrays, sum(path.stat().st_size for path in files.values()))
    tensors: list[LazyTensor] = [
        OrbaxTensor(TensorInfo(name, array.grid.dtype, array.grid.shape, directory), array)
        for name, array in arrays.items()
    ]
    return tensors, _metadata(tree)


class OrbaxTensor(LazyTensor):
    """A tensor of a zarr store; `first` is the row of the array with which it begins."""

    def __init__(self, info: TensorInfo, array: ZarrArray, first: int = 0) -> None:
        self.info = info
        self._array = array
        self._first = first

    @property
    def maps(self) -> bool:
        """Whether `map` gives a view onto a file, and no copy."""
        return False

    def map(self) -> NDArray[Any]:
        """Return what `read` returns: chunks cannot be seen as one array."""
        return self.read()

    def read(self) -> NDArray[Any]:
        """Return a fresh private array in C order, aligned; one chunk is decoded at a time."""
        return self._read_box([(0, length) for length in self.shape])

    def read_stored(self) -> NDArray[Any]:
        """Return what `read` returns."""
        return self.read()

    def read_slice(self, dim: int, start: int, stop: int) -> NDArray[Any]:
        """Return elements `start` to `stop` of dimension `dim` as a fresh array in C order.

        Only the chunks needed are read. Raises InputError if there is no such slice.
        """
        self._check_slice(dim, start, stop)
        box = [(0, length) for length in self.shape]
        box[dim] = (start, stop)
        return self._read_box(box)

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Return rows `start` to `stop` of the first dimension as a tensor of its own, unread.

        Raises InputError if there are no such rows.
        """
        self._check_slice(0, start, stop)
        info = replace(self.info, shape=(stop - start, *self.shape[1:]))
        return OrbaxTensor(info, self._array, self._first + start)

    def blocks(self, nbytes: int = BLOCK) -> Iterator[NDArray[Any]]:
        """Yield the values in C order: whole rows of chunks, as many as take about `nbytes`."""
        if not self.streams or not self.info.size:
            yield from super().blocks(nbytes)
            return
        chunk = self._array.grid.chunks[0]
        step = chunk * max(1, nbytes * self.shape[0] // (self.info.nbytes * chunk))
        bounds = [*range(-(self._first % chunk), self.shape[0], step), self.shape[0]]
        for start, stop in itertools.pairwise(bounds):
            yield self.read_slice(0, max(start, 0), stop)

    @property
    def streams(self) -> bool:
        """Whether some rows can be read without reading all: not if they are one row of chunks."""
        return bool(self.shape) and self._array.grid.chunks[0] < self.shape[0]

    def _read_box(self, box: list[tuple[int, int]]) -> NDArray[Any]:
        """Read what lies between the bounds of each dimension."""
        out = empty_aligned(tuple(stop - start for start, stop in box), self.dtype)
        if not out.size:
            return out
        box = [(start + self._first, stop + self._first) for start, stop in box[:1]] + box[1:]
        chunks = self._array.grid.chunks
        touched = [
            range(start // step, -(-stop // step))
            for (start, stop), step in zip(box, chunks, strict=True)
        ]
        for place in itertools.product(*touched):
            target: list[Any] = []
            part: list[Any] = []
            for at, step, (start, stop) in zip(place, chunks, box, strict=True):
                low, high = max(start, at * step), min(stop, (at + 1) * step)
                target.append(slice(low - start, high - start))
                part.append(slice(low - at * step, high - at * step))
            self._read_chunk(place, out[(*target, ...)], (*part, ...))
        return out

    def _read_chunk(self, place: tuple[int, ...], target: NDArray[Any], part: Any) -> None:
        """Fill `target` with a part of a chunk; all of it goes straight to its place if it can."""
        grid = self._array.grid
        whole = target.shape == grid.chunks and target.flags.c_contiguous
        chunk = target if whole else empty_aligned(grid.chunks, grid.dtype)
        self._array.read_into(place, chunk.reshape(-1).view(np.uint8))
        if not whole:
            target[...] = chunk[part]


def _read_tree(file: Path) -> dict[str, Any]:
    value = file_value(file)
    if value.length > JSON_LIMIT:
        raise FormatError(f"{file}: expected at most {JSON_LIMIT} bytes, found {value.length}.")
    tree = parse_json_object(bytes(value.read()), str(file))
    if not isinstance(tree.get("tree_metadata"), dict):
        raise FormatError(
            f"{file}: expected 'tree_metadata' to describe a tree of names, found none. It is "
            "damaged, or of a release of orbax that is not known here."
        )
    return tree


def _metadata(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return what the writer said besides, as far as it is text."""
    custom = tree.get("custom_metadata")
    if not isinstance(custom, dict):
        return {}
    return {key: text for key, text in custom.items() if isinstance(text, str)}


def _names(tree: Mapping[str, Any], directory: Path) -> list[str]:
    """Return the names of the arrays; raises FormatError for one that could be a path."""
    names = []
    for where, entry in tree["tree_metadata"].items():
        match entry:
            case {"key_metadata": [*keys], "value_metadata": {"value_type": str(kind)}} if keys:
                if kind not in _ARRAYS:
                    continue
                path = [key.get("key") if isinstance(key, dict) else None for key in keys]
            case _:
                path = []
        name = ".".join(str(key) for key in path)
        if not path or not all(map(plain_name, path)) or not plain_name(name):
            raise FormatError(
                f"{directory / METADATA}: {where[:200]!r}: expected keys that are plain names, found "
                f"{path!r:.200}. Nothing was opened; do not trust this checkpoint."
            )
        names.append(name)
    if len(names) != len(set(names)):
        raise FormatError(f"{directory / METADATA}: expected names that differ, found one twice.")
    return names


def _check_claims(directory: Path, arrays: Mapping[str, ZarrArray], stored: int) -> None:
    """Check that arrays and their chunks are not far larger, or more, than fits their files."""
    limit = max(_SMALL, _RATIO * stored)
    most = _FEW + stored // _MEAN
    total = chunks = 0
    for name, array in arrays.items():
        info = TensorInfo(name, array.grid.dtype, array.grid.shape, directory)
        total += info.nbytes
        chunks += array.grid.num_chunks if array.grid.compressed else 0
        if max(total, array.grid.chunk_nbytes) > limit:
            raise FormatError(
                f"{directory}: {name}: expected arrays of at most {limit} bytes in files of "
                f"{stored}, found {max(total, array.grid.chunk_nbytes)} declared. The checkpoint is "
                "damaged, or made to fill the memory; if it is sound, save it without compression."
            )
        if chunks > most:
            raise FormatError(
                f"{directory}: {name}: expected at most {most} compressed chunks in files of "
                f"{stored} bytes, found more. The checkpoint is damaged, or made to take long; if "
                "it is sound, save it without compression."
            )
