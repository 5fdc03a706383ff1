# SPDX-License-Identifier: Apache-2.0
"""Tensors that are described when a file is opened and read only when somebody asks for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from opt_core.checkpoints.sources import ArraySource, ByteSource, FileSource
from opt_core.errors import FormatError, InputError

ALIGNMENT = 64
"""Bytes: a cache line, and what jax needs to take an array over without copying it."""

BLOCK = 2**23
"""Bytes: what is read, converted and written at a time where a tensor need not be in memory whole."""

_MAX_DIMS = 32
_MAX_BYTES = 2**62


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before its values are read.

    Raises FormatError for a shape that no array can have.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: Path

    def __post_init__(self) -> None:
        plain = all(type(length) is int and length >= 0 for length in self.shape)
        extent = math.prod(max(length, 1) for length in self.shape) if plain else 0
        if not plain or len(self.shape) > _MAX_DIMS or extent * self.dtype.itemsize > _MAX_BYTES:
            raise FormatError(
                f"{self.file}: tensor {self.name!r}: expected a shape of at most {_MAX_DIMS} "
                f"lengths >= 0, found {str(self.shape)[:200]}. The file is damaged: fetch it again."
            )

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the values."""
        return self.size * self.dtype.itemsize


class LazyTensor:
    """One tensor of a file: its description now, its values when asked for.

    `strides` counts elements, as torch does; None means C order. Raises FormatError if the tensor
    does not lie within the source.
    """

    def __init__(
        self,
        info: TensorInfo,
        source: ByteSource,
        offset: int = 0,
        strides: Sequence[int] | None = None,
    ) -> None:
        self.info = info
        self._source = source
        self._offset = offset
        self._strides = tuple(strides) if strides is not None else None
        self._span = element_span(info.shape, strides) if strides is not None else info.size
        end = offset + self._span * info.dtype.itemsize
        if offset < 0 or end > source.size:
            raise FormatError(
                f"{info.file}: tensor {info.name!r}: expected its bytes {offset} to {end} within "
                f"the file, found a file of {source.size} bytes. The file is damaged or its "
                "download incomplete: fetch it again."
            )

    @classmethod
    def from_array(cls, name: str, array: NDArray[Any]) -> LazyTensor:
        """Wrap an array in memory; `map` gives that memory, or a copy in C order if need be."""
        source = ArraySource(array)
        return cls(TensorInfo(name, array.dtype, array.shape, source.path), source)

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.dtype}, {self.shape}, {self.info.file.name})"

    @property
    def name(self) -> str:
        """The tensor's name in its file."""
        return self.info.name

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the elements; bfloat16 is that of ml_dtypes."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each dimension."""
        return self.info.shape

    def lies_where(self, other: LazyTensor) -> bool:
        """Tell whether both are the same bytes of the same file, read alike: one tensor, two names."""
        return (
            self._source is other._source
            and (self._offset, self._strides) == (other._offset, other._strides)
            and (self.dtype, self.shape) == (other.dtype, other.shape)
        )

    @property
    def maps(self) -> bool:
        """Whether `map` gives a view onto a file, and no copy."""
        return isinstance(self._source, FileSource)

    def map(self) -> NDArray[Any]:
        """Return a view onto the file: nothing is copied, pages are read when touched.

        The array can be written to and the file does not change. Tensors that share bytes in the
        file, and several maps of one tensor, share them in memory too. A view lies where the file
        put it, which need not be aligned.
        """
        if not self.info.size:
            return np.empty(self.shape, self.dtype)
        flat = np.frombuffer(self._source.memory(), self.dtype, self._span, self._offset)
        return self._shaped(flat)

    def read(self) -> NDArray[Any]:
        """Return a fresh private array, in C order and aligned to 64 bytes, without any mapping.

        It takes the tensor's memory and no more; a tensor stored in another order (a transposed
        one of a torch file) needs it twice while it is turned.
        """
        stored = self.read_stored()
        if self._strides is None:
            return stored
        out = empty_aligned(self.shape, self.dtype)
        out[...] = stored
        return out

    def read_stored(self) -> NDArray[Any]:
        """Return a fresh private array in whatever order the values are stored: read only once."""
        flat = empty_aligned((self._span,), self.dtype)
        self._source.read_into(flat.view(np.uint8), self._offset)
        return self._shaped(flat)

    def read_slice(self, dim: int, start: int, stop: int) -> NDArray[Any]:
        """Return elements `start` to `stop` of dimension `dim` as a fresh array in C order.

        Only the bytes needed are read, unless the tensor is stored in another order. Raises
        InputError if there is no such slice.
        """
        self._check_slice(dim, start, stop)
        shape = (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])
        out = empty_aligned(shape, self.dtype)
        if self._strides is not None:
            out[...] = self.read_stored()[(slice(None),) * dim + (slice(start, stop),)]
            return out
        item = math.prod(self.shape[dim + 1 :]) * self.dtype.itemsize
        if out.size:
            for row, run in enumerate(out.reshape(math.prod(shape[:dim]), -1).view(np.uint8)):
                self._source.read_into(run, self._offset + (row * self.shape[dim] + start) * item)
        return out

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Return rows `start` to `stop` of the first dimension as a tensor of its own, unread.

        Raises InputError if there are no such rows.
        """
        self._check_slice(0, start, stop)
        info = replace(self.info, shape=(stop - start, *self.shape[1:]))
        row = math.prod(self.shape[1:]) if self._strides is None else self._strides[0]
        offset = self._offset + (start * row * self.dtype.itemsize if info.size else 0)
        return LazyTensor(info, self._source, offset, self._strides)

    def blocks(self, nbytes: int = BLOCK) -> Iterator[NDArray[Any]]:
        """Yield the values in C order: runs of rows that take about `nbytes` each.

        Where rows cannot be read one by one, the tensor is in memory whole meanwhile.
        """
        if not self.shape or not self.info.size:
            yield self.read()
            return
        stored = None if self.streams else self.read_stored()
        step = max(1, nbytes * self.shape[0] // self.info.nbytes)
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            if stored is None:
                yield self.read_slice(0, start, stop)
            else:
                yield np.ascontiguousarray(stored[start:stop])

    @property
    def streams(self) -> bool:
        """Whether some rows can be read without reading all."""
        return self._strides is None and bool(self.shape)

    def _check_slice(self, dim: int, start: int, stop: int) -> None:
        if not 0 <= dim < len(self.shape) or not 0 <= start <= stop <= self.shape[dim]:
            raise InputError(
                f"{self.name}: expected a slice within shape {self.shape}, found "
                f"[{start}:{stop}] of dimension {dim}."
            )

    def _shaped(self, flat: NDArray[Any]) -> NDArray[Any]:
        if self._strides is None or not self.info.size:
            return flat.reshape(self.shape)
        itemsize = self.dtype.itemsize
        return as_strided(flat, self.shape, [stride * itemsize for stride in self._strides])


def element_span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many elements lie from the first to the last of a strided tensor, both counted."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array of undefined values whose first byte stands at a multiple of 64."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
