# SPDX-License-Identifier: Apache-2.0
"""Flat parameters of fairscale's FullyShardedDataParallel, cut into the tensors they were made of.

Each FSDP module has joined its parameters into flat ones; rank r of R keeps the r-th piece of each,
padded to the same length everywhere. `shard_metadata` of each file says what is in a flat parameter
(names, shapes, numels) and how much of this rank's piece is padding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from opt_core.checkpoints.joined import JoinedTensor
from opt_core.checkpoints.tensors import LazyTensor, TensorInfo
from opt_core.errors import FormatError

#: Names of the modules that FSDP puts around others.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_fpw_module"})
_MAX_LENGTH = 2**62
_MAX_DIMS = 8
_MAX_NAME = 200
_MAX_TENSORS = 100_000  # a list can stand in a pickle a thousand times and be stored once


@dataclass(frozen=True)
class Flat:
    """One flat parameter: its name in the files, and the tensors in it one after another."""

    key: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    on_every_rank: bool = False  # whole in each file instead of in pieces

    @property
    def size(self) -> int:
        """Number of elements without padding."""
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Structure:
    """What all ranks of a model-parallel part agree on: flat parameters, and (source, copy) names."""

    flats: tuple[Flat, ...]
    shared: tuple[tuple[str, str], ...] = ()


def parse_metadata(metadata: Any, where: object) -> tuple[Structure, tuple[int, ...]]:
    """Return the structure that `shard_metadata` describes, and this rank's padding of each flat.

    Raises FormatError if it is not as fairscale writes it.
    """
    flats, shared, padding = [], [], []
    room = _MAX_TENSORS
    for module in _list(_entry(metadata, "param_metadata", where), where):
        prefix = _entry(module, "fsdp_path", where)
        whole = module.get("no_broadcast_optim_state", False) is True
        for name, param in _params(module, where):
            names = _list(_entry(param, "names", where), where)
            room -= 1 + len(names)
            if room < 0:
                raise _unknown(where, f"more than {_MAX_TENSORS} tensors")
            paths = tuple(_path(prefix, inner, where) for inner in names)
            shapes = _shapes(param, len(names), where)
            flats.append(Flat(_path(prefix, name, where), paths, shapes, whole))
            padding.append(_entry(param, "padding", where))
        pairs = _list(module.get("shared_param_info", ()), where)
        room -= len(pairs)
        if room < 0:
            raise _unknown(where, f"more than {_MAX_TENSORS} tensors")
        for pair in pairs:
            source, copy = _list(pair, where, length=2)
            shared.append((_path(prefix, source, where), _path(prefix, copy, where)))
    if not all(type(count) is int and count >= 0 for count in padding):
        raise _unknown(where, "a padding that is no number >= 0")
    for once in ([flat.key for flat in flats], [name for flat in flats for name in flat.names]):
        if len(set(once)) < len(once):  # a module costs two bytes to repeat, and its pieces memory
            twice = next(name for name, count in Counter(once).items() if count > 1)
            raise _unknown(where, f"two parameters {twice!r}")
    return Structure(tuple(flats), tuple(shared)), tuple(padding)


def unpad(
    structure: Structure,
    padding: Sequence[int],
    tensors: Mapping[str, LazyTensor],
    where: object,
) -> list[LazyTensor]:
    """Return one rank's piece of each flat parameter without its padding.

    Raises FormatError for a piece that is missing, not flat or shorter than its padding.
    """
    pieces = []
    for flat, pad in zip(structure.flats, padding, strict=True):
        piece = tensors.get(flat.key)
        if piece is None or len(piece.shape) != 1 or pad > piece.shape[0]:
            found = "none" if piece is None else f"shape {piece.shape}"
            raise FormatError(
                f"{where}: {flat.key!r}: expected a flat parameter with {pad} elements of padding, "
                f"as shard_metadata says, found {found}. The file is damaged: fetch it again."
            )
        pieces.append(piece.rows(0, piece.shape[0] - pad))
    return pieces


def unflatten(
    structure: Structure, ranks: Sequence[Sequence[LazyTensor]], where: object
) -> list[LazyTensor]:
    """Return the tensors that the unpadded pieces of all ranks hold, by the structure's names.

    Raises FormatError if the pieces are not as long together as the tensors, or differ in dtype.
    """
    tensors: dict[str, LazyTensor] = {}
    for number, flat in enumerate(structure.flats):
        pieces = [rank[number] for rank in ranks[: 1 if flat.on_every_rank else None]]
        first = pieces[0].info
        whole = JoinedTensor(TensorInfo(flat.key, first.dtype, (flat.size,), first.file), pieces, 0)
        start = 0
        for name, shape in zip(flat.names, flat.shapes, strict=True):
            info = TensorInfo(name, first.dtype, shape, first.file)
            tensors[name] = JoinedTensor(info, [whole.rows(start, start + info.size)], None)
            start += info.size
    for source, copy in structure.shared:
        if source not in tensors or copy in tensors:
            raise FormatError(
                f"{where}: expected a parameter {source!r} that {copy!r} shares, "
                "found none, or both. The file is damaged: fetch it again."
            )
        shared = tensors[source]
        tensors[copy] = JoinedTensor(replace(shared.info, name=copy), [shared], 0)
    return list(tensors.values())


@lru_cache(maxsize=8192)  # a thousand files have the same names
def clean(name: str) -> str:
    """Return a parameter's name without the names of the modules that FSDP wraps around others."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _shapes(param: Any, count: int, where: object) -> tuple[tuple[int, ...], ...]:
    """Return the checked shapes of the tensors in a flat parameter."""
    shapes = _list(_entry(param, "shapes", where), where, count)
    numels = _list(_entry(param, "numels", where), where, count)
    for shape, numel in zip(shapes, numels, strict=True):
        plain = len(_list(shape, where)) <= _MAX_DIMS and all(
            type(length) is int and 0 <= length < _MAX_LENGTH for length in shape
        )
        if not plain or type(numel) is not int or math.prod(shape) != numel:
            raise _unknown(where, "a shape that does not have its number of elements")
    return tuple(tuple(shape) for shape in shapes)


def _params(module: dict[str, Any], where: object) -> Iterable[tuple[str, Any]]:
    params = _entry(module, "params", where)
    if not isinstance(params, dict):
        raise _unknown(where, "'params' that are no dictionary")
    return params.items()


def _entry(mapping: Any, key: str, where: object) -> Any:
    if not isinstance(mapping, dict) or key not in mapping:
        raise _unknown(where, f"no {key!r}")
    return mapping[key]


def _list(value: Any, where: object, length: int | None = None) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
        raise _unknown(where, "a list that is none, or of another length")
    return value


def _path(prefix: Any, name: Any, where: object) -> str:
    for text in (prefix, name):
        if not isinstance(text, str) or len(text) > _MAX_NAME:
            raise _unknown(where, "a name that is no text, or endless")
    return clean(f"{prefix}.{name}" if prefix else name)


def _unknown(where: object, found: str) -> FormatError:
    return FormatError(
        f"{where}: expected shard_metadata as fairscale writes it, found {found}. The file is "
        "damaged: fetch it again."
    )
