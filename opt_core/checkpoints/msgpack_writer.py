# SPDX-License-Identifier: Apache-2.0
"""Files of Flax (`flax_model.msgpack`), written without flax: see msgpack_format for what they are.

All sizes are known before the values, so the file is planned whole: texts at their positions, and
between them runs of values.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opt_core.checkpoints.msgpack_format import (
    ARRAY,
    CHUNKED,
    DTYPES,
    MAX_DEPTH,
    MAX_NAME,
    SEPARATOR,
)
from opt_core.checkpoints.msgpack_wire import TRUE, Kind, extension, head, text
from opt_core.checkpoints.output import Blocks, PositionedFile, TensorLike, checked, nbytes
from opt_core.errors import InputError

MAX_CHUNK = 2**30
"""Bytes: an array of more is written in parts of that size, as Flax does."""

# The keys below an array that is written in parts count where it is read.
_MAX_PARTS, _MAX_NAME = MAX_DEPTH - 4, MAX_NAME - 100

_Tree = dict[str, "TensorLike | _Tree"]


def create_msgpack(
    path: Path, infos: Sequence[TensorLike], metadata: Mapping[str, str]
) -> PositionedFile:
    """Begin a file; the format has no room for metadata.

    Raises InputError for a dtype that Flax does not know, and for names that do not make a tree.
    """
    plan = _Plan()
    plan.add_tree(_tree(infos))
    return _File(path, infos, plan)


def _tree(infos: Sequence[TensorLike]) -> _Tree:
    """Nest the tensors by the parts of their names."""
    tree: _Tree = {}
    for info in infos:
        *parents, leaf = info.name.split(SEPARATOR)
        node = tree
        for key in parents:
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise _refuse(info, f"a name that does not go on from {child.name!r}", info.name)
            node = child
        if leaf in node:
            raise _refuse(info, "a name of its own", "one that another has, or goes on from")
        if CHUNKED in (*parents, leaf):
            raise _refuse(info, "names of parameters", f"what marks an array in parts, {CHUNKED}")
        if len(parents) >= _MAX_PARTS or len(info.name) > _MAX_NAME:
            limits = f"at most {_MAX_NAME} characters in {_MAX_PARTS} parts"
            raise _refuse(info, limits, f"{len(info.name)} in {len(parents) + 1}")
        if info.dtype not in DTYPES.values():
            raise _refuse(info, f"a dtype of {', '.join(DTYPES)}", str(info.dtype))
        node[leaf] = info
    return tree


def _refuse(info: TensorLike, expected: str, found: str) -> InputError:
    return InputError(f"{info.name[:200]}: expected {expected}, found {found}.")


class _Plan:
    """A file to be: bytes by their positions, and runs (position, length) by names of tensors."""

    def __init__(self) -> None:
        self.texts: dict[int, bytes] = {}
        self.runs: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._end = 0

    def add_tree(self, tree: _Tree) -> None:
        """Add a map of arrays and maps."""
        self._add(head(Kind.MAP, len(tree)))
        for key, value in tree.items():
            self._add(text(key))
            if isinstance(value, dict):
                self.add_tree(value)
            elif nbytes(value) > MAX_CHUNK:
                self._add_chunks(value)
            else:
                self._add_array(value.name, value.dtype, tuple(value.shape))

    def _add_chunks(self, info: TensorLike) -> None:
        """Add a large array as Flax does: its shape, and flat parts of it."""
        size, step = math.prod(info.shape), max(1, MAX_CHUNK // info.dtype.itemsize)
        self._add(head(Kind.MAP, 3) + text(CHUNKED) + TRUE)
        self._add(text("shape") + head(Kind.MAP, len(info.shape)))
        for number, length in enumerate(info.shape):
            self._add(text(str(number)) + head(Kind.UINT, length))
        self._add(text("chunks") + head(Kind.MAP, -(-size // step)))
        for number, start in enumerate(range(0, size, step)):
            self._add(text(str(number)))
            self._add_array(info.name, info.dtype, (min(step, size - start),))

    def _add_array(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        length = math.prod(shape) * dtype.itemsize
        description = head(Kind.LIST, 3) + head(Kind.LIST, len(shape))
        description += b"".join(head(Kind.UINT, n) for n in shape)
        description += text(dtype.name) + head(Kind.BYTES, length)
        self._add(extension(ARRAY, len(description) + length) + description)
        self.runs[name].append((self._end, length))
        self._end += length

    def _add(self, data: bytes) -> None:
        self.texts[self._end] = data
        self._end += len(data)


class _File(PositionedFile):
    """A file whose tensors may lie in several runs each."""

    def __init__(self, path: Path, infos: Sequence[TensorLike], plan: _Plan) -> None:
        starts = {name: runs[0][0] for name, runs in plan.runs.items()}
        super().__init__(path, infos, plan.texts, starts)
        self._runs = plan.runs

    def write(self, name: str, blocks: Blocks) -> None:
        runs = iter(self._runs[name])
        left = 0
        for data in checked(self._infos[name], blocks):
            while len(data):
                if not left:
                    position, left = next(runs)
                    self._file.seek(position)
                piece, data = data[:left], data[left:]
                self.put(piece)
                left -= len(piece)
