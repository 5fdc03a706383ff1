# SPDX-License-Identifier: Apache-2.0
"""The files of a metaseq checkpoint one by one: what each holds, and how ranks make up a part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opt_core.checkpoints.tensors import LazyTensor
from opt_core.checkpoints.torch_format import read_pickled
from opt_core.checkpoints.torch_pickle import StoredTensor
from opt_core.errors import FormatError
from opt_core.metaseq.config import Settings, config_beside, read_settings
from opt_core.metaseq.files import Grid, Pool, RestingSource
from opt_core.metaseq.flat import Structure, clean, parse_metadata, unflatten, unpad
from opt_core.metaseq.implied import imply_structure
from opt_core.metaseq.parts import Tensors

_FLAT_NAME = re.compile(r"(.*\.)?flat_param_\d+")


@dataclass(frozen=True)
class _Rank:
    """What is kept of one file: its pieces of flat parameters, and its other tensors."""

    structure: Structure
    pieces: list[LazyTensor]
    others: Tensors


def read_parts(grid: Grid, pool: Pool) -> tuple[list[Tensors], Settings]:
    """Read the headers of all files: the tensors of each model-parallel part, the run's settings.

    Raises FormatError if a file is damaged or does not fit the others of its part.
    """
    parts: list[Tensors] = []
    settings: Settings = {}
    updates: int | None = None
    for row in grid.rows:
        ranks: list[_Rank] = []
        for file in row:
            value, tensors = _read_file(pool.open(file))
            settings = settings or read_settings(value)
            updates = _same_updates(updates, value, file)
            rank = _read_rank(value, tensors, grid, file)
            ranks.append(_checked(rank, ranks[0] if ranks else rank, file))
        parts.append(_merge(ranks, row[0]))
    return parts, settings


def _read_file(source: RestingSource) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Return all that a file holds, and its tensors; a state dict may lie bare in it."""
    value, place = read_pickled(source)
    model = value.get("model", value) if isinstance(value, dict) else None
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in model.items() if isinstance(model, dict) else ():
        if isinstance(tensor, StoredTensor):
            known = clean(name)
            if known in tensors:
                raise FormatError(f"{source.path}: expected one tensor {known!r}, found two.")
            tensors[known] = place(known, tensor)
    if not tensors:
        raise FormatError(
            f"{source.path}: expected a checkpoint of metaseq (a dictionary with the tensors under "
            "'model'), found no tensors there. Is it a checkpoint?"
        )
    return value, tensors


def _same_updates(updates: int | None, value: Mapping[str, Any], file: Path) -> int | None:
    """Return the number of updates that the training run had made, which is that of all files."""
    history = value.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    found = last.get("num_updates") if isinstance(last, dict) else None
    if type(found) is not int or updates in (None, found):
        return found if type(found) is int else updates
    raise FormatError(
        f"{file}: expected the checkpoint after {updates} updates, as in the first file, found one "
        f"after {str(found)[:50]}. The files are not of one checkpoint: fetch them again."
    )


def _read_rank(value: Mapping[str, Any], tensors: Tensors, grid: Grid, file: Path) -> _Rank:
    """Tell a file's flat parameters, padding removed, from its other tensors."""
    metadata = value.get("shard_metadata")
    flat = {name: tensor.shape for name, tensor in tensors.items() if _FLAT_NAME.fullmatch(name)}
    structure = Structure(())
    padding: tuple[int, ...] = ()
    if metadata:
        structure, padding = parse_metadata(metadata, file)
        if not flat and not any(flat.key in tensors for flat in structure.flats):
            structure, padding = Structure(()), ()  # metaseq's scripts unflatten, and leave it
    elif flat:
        parts, shards = len(grid.rows), len(grid.rows[0])
        structure = imply_structure(flat, parts, shards, config_beside(grid.folder), file)
        padding = (0,) * len(structure.flats)
    pieces = unpad(structure, padding, tensors, file)
    flats = {flat.key for flat in structure.flats}
    others = {name: tensor for name, tensor in tensors.items() if name not in flats}
    return _Rank(structure, pieces, others)


def _checked(rank: _Rank, first: _Rank, file: Path) -> _Rank:
    """Return a rank of the same structure as the first, with which it then shares it."""
    if rank.structure != first.structure or _outline(rank) != _outline(first):
        raise FormatError(
            f"{file}: expected the same parameters as in the part's first shard, found others. Are "
            "the files of one checkpoint?"
        )
    return replace(rank, structure=first.structure, others=first.others)


def _outline(rank: _Rank) -> dict[str, Any]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in rank.others.items()}


def _merge(ranks: Sequence[_Rank], file: Path) -> Tensors:
    """Return the tensors of one model-parallel part; what is not flat is the same in all ranks."""
    first = ranks[0]
    if len(ranks) > 1 and not first.structure.flats:
        raise FormatError(
            f"{file}: expected shard_metadata, since there are "
            f"{len(ranks)} shards, and flat parameters, found none. Save the checkpoint with its metadata."
        )
    tensors = unflatten(first.structure, [rank.pieces for rank in ranks], file)
    merged = {tensor.name: tensor for tensor in tensors}
    for name, tensor in first.others.items():
        if merged.setdefault(name, tensor) is not tensor:
            raise FormatError(
                f"{file}: tensor {name!r}: expected it once, found it flattened and "
                "as it is. The file is damaged: fetch it again."
            )
    return merged
