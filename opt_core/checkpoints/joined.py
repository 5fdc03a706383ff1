# SPDX-License-Identifier: Apache-2.0
"""A tensor that lies in several pieces, side by side or run after run, and is read as one."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.tensors import LazyTensor, TensorInfo, empty_aligned
from opt_core.errors import FormatError

_PIECE = 2**20
"""Bytes that are read at a time before they are put in their place."""


class JoinedTensor(LazyTensor):
    """The tensor `info` made of `parts` that stand side by side along dimension `dim`.

    With `dim` None the parts are flat runs: one after another they are the elements in C order.
    Parts may be joined themselves. Raises FormatError unless they make up the tensor exactly.
    """

    def __init__(self, info: TensorInfo, parts: Sequence[LazyTensor], dim: int | None) -> None:
        self.info = info
        self._parts = tuple(parts)
        self._dim = dim
        self._axis = 0 if dim is None else dim
        self._start = 0  # where in the joined dimension of the parts this tensor begins
        for part in self._parts:
            if part.dtype != info.dtype or not self._fits(part.shape):
                raise self._misfit(part.info.file, f"a part of {part.dtype} {part.shape}")
        length = sum(part.shape[self._axis] for part in self._parts)
        if length != (info.size if dim is None else info.shape[dim]):
            raise self._misfit(info.file, f"{len(self._parts)} parts of {length} in all")

    @property
    def maps(self) -> bool:
        """Whether `map` gives a view onto a file, and no copy."""
        return False

    def map(self) -> NDArray[Any]:
        """Return what `read` returns: pieces cannot be seen as one without copying them."""
        return self.read()

    def read(self) -> NDArray[Any]:
        """Return a fresh private array in C order, aligned; a megabyte or two is held beside it."""
        out = empty_aligned(self.shape, self.dtype)
        self._fill(out)
        return out

    def read_stored(self) -> NDArray[Any]:
        """Return what `read` returns."""
        return self.read()

    def read_slice(self, dim: int, start: int, stop: int) -> NDArray[Any]:
        """Return elements `start` to `stop` of dimension `dim` as a fresh array in C order.

        Only the parts needed are read. Raises InputError if there is no such slice.
        """
        self._check_slice(dim, start, stop)
        if dim == 0:
            return self.rows(start, stop).read()
        out = empty_aligned((*self.shape[:dim], stop - start, *self.shape[dim + 1 :]), self.dtype)
        done = 0
        if self._dim is None:
            for block in self.blocks():
                out[done : done + len(block)] = block[(slice(None),) * dim + (slice(start, stop),)]
                done += len(block)
        elif dim != self._dim:
            for place, part in self._pieces(self.shape[self._dim]):
                out[place] = part.read_slice(dim, start, stop)
        else:
            for part, first, last in self._within(start, stop):
                target = out[self._along(done, done + last - first)]
                target[...] = part.read_slice(dim, first, last)
                done += last - first
        return out

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Return rows `start` to `stop` of the first dimension as a tensor of its own, unread.

        Raises InputError if there are no such rows.
        """
        self._check_slice(0, start, stop)
        info = replace(self.info, shape=(stop - start, *self.shape[1:]))
        if self._axis:
            return JoinedTensor(info, [part.rows(start, stop) for part in self._parts], self._dim)
        rows = copy.copy(self)  # the parts are shared: one flat run serves hundreds of tensors
        rows.info = info
        rows._start += start * (math.prod(self.shape[1:]) if self._dim is None else 1)
        return rows

    @property
    def streams(self) -> bool:
        """Whether some rows can be read without reading all."""
        return bool(self.shape) and all(part.streams for part in self._parts)

    def _fits(self, shape: tuple[int, ...]) -> bool:
        if self._dim is None:
            return len(shape) == 1
        rest = slice(self._dim + 1, None)
        return (
            len(shape) == len(self.shape) > self._dim >= 0
            and shape[: self._dim] == self.shape[: self._dim]
            and shape[rest] == self.shape[rest]
        )

    def _fill(self, out: NDArray[Any]) -> None:
        """Read the values into `out`, which is one run of memory if the parts are flat."""
        target = out.reshape(-1) if self._dim is None else out
        for place, part in self._pieces(target.shape[self._axis]):
            _fill(target[place], part)

    def _along(self, start: int, stop: int) -> tuple[slice, ...]:
        return (slice(None),) * self._axis + (slice(start, stop),)

    def _pieces(self, length: int) -> Iterator[tuple[tuple[slice, ...], LazyTensor]]:
        """Yield what of each part lies in this tensor, and where."""
        done = 0
        for part, first, last in self._within(0, length):
            piece = part if self._axis else part.rows(first, last)
            yield self._along(done, done + last - first), piece
            done += last - first

    def _within(self, start: int, stop: int) -> Iterator[tuple[LazyTensor, int, int]]:
        """Yield each part that lies in `start` to `stop` of the joined dimension, and what of it."""
        begin = -self._start
        for part in self._parts:
            length = part.shape[self._axis]
            first, last = max(start - begin, 0), min(stop - begin, length)
            if first < last:
                yield part, first, last
            begin += length

    def _misfit(self, file: object, found: str) -> FormatError:
        how = "run after run" if self._dim is None else f"side by side in dimension {self._dim}"
        return FormatError(
            f"{file}: tensor {self.name!r}: expected parts that make up {self.dtype} {self.shape} "
            f"{how}, found {found}. The files are not of one checkpoint, or one is damaged: fetch "
            "them again."
        )


def _fill(target: NDArray[Any], part: LazyTensor) -> None:
    """Read a part into its place: parts of parts straight there, else a little at a time."""
    if isinstance(part, JoinedTensor) and (part._dim is not None or target.flags.c_contiguous):
        part._fill(target)
        return
    if not part.shape or not part.info.size:
        np.copyto(target, part.read())
        return
    done = 0
    for block in part.blocks(_PIECE):
        target[done : done + len(block)] = block
        done += len(block)
