# SPDX-License-Identifier: Apache-2.0
"""Model-parallel parts put together, and fused query, key and value projections taken apart.

Which dimension of a parameter is split over the parts is read from the parameter table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from opt_core.checkpoints.joined import JoinedTensor
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.dialects import DIALECTS
from opt_core.errors import FormatError
from opt_core.params import DECODER_PARAMS, Param, ParamSpec

DIALECT = DIALECTS["pt"]  # metaseq's names are Hugging Face's, but for some modules
FUSED = "qkv_proj"
IN_FUSED = ("k_proj", "v_proj", "q_proj")
"""The order of rows in a fused projection (metaseq `multihead_attention.py`), whatever its name says."""

_LAYER = re.compile(r"layers\.\d+\.")

Tensors = Mapping[str, LazyTensor]


def join_parts(parts: Sequence[Tensors]) -> Iterator[LazyTensor]:
    """Yield the tensors of the whole model, given those of each model-parallel part by name.

    Tensors that are the embedding again (the output projection) or say nothing are left out. Raises
    FormatError if the parts do not hold the same tensors, or these do not fit together.
    """
    table = spelt_table()
    for number, part in enumerate(parts):
        if part.keys() != parts[0].keys():
            odd = sorted(part.keys() ^ parts[0].keys())
            file = next((tensor.info.file for tensor in part.values()), "the checkpoint")
            raise FormatError(
                f"{file}: expected the same tensors in all model-parallel parts, found {odd[0]!r} in only "
                f"one of the parts 0 and {number} ({len(odd)} such). Are the files of one checkpoint?"
            )
    for name in parts[0]:
        if DIALECT.drops(name):
            continue
        pieces = [part[name] for part in parts]
        if FUSED in name.split("."):
            rows = zip(*(_take_apart(piece) for piece in pieces), strict=True)
            for module, split in zip(IN_FUSED, rows, strict=True):
                unfused = name.replace(FUSED, module)
                yield _join(unfused, split, table.get(_in_layer_0(unfused)))
        else:
            yield _join(name, pieces, table.get(_in_layer_0(name)))


def spelt_table() -> dict[str, ParamSpec]:
    """Return the table by every spelling of its names; layers are all like layer 0."""
    rows = (Param(spec.name.format(layer=0), spec, ()) for spec in DECODER_PARAMS)
    return {spelling: param.spec for param in rows for spelling in DIALECT.spellings(param)}


def _in_layer_0(name: str) -> str:
    return _LAYER.sub("layers.0.", name)


def _take_apart(fused: LazyTensor) -> list[LazyTensor]:
    """Return the three equal blocks of rows of one part's fused projection."""
    length = fused.shape[0] if fused.shape else 1
    if length % 3:
        raise FormatError(
            f"{fused.info.file}: tensor {fused.name!r}: expected rows of three projections, found "
            f"shape {fused.shape}. The file is damaged: fetch it again."
        )
    third = length // 3
    return [fused.rows(third * i, third * (i + 1)) for i in range(3)]


def _join(name: str, pieces: Sequence[LazyTensor], spec: ParamSpec | None) -> LazyTensor:
    """Return one tensor made of its pieces in all parts; one unknown to the table is replicated."""
    first = pieces[0]
    dim = spec.split_dim() if spec else None
    if dim is None:
        for piece in pieces:
            if piece.shape != first.shape or piece.dtype != first.dtype:
                raise FormatError(
                    f"{piece.info.file}: tensor {name!r}: expected {first.dtype} {first.shape} as "
                    f"in {first.info.file.name}, since every part has all of it, found "
                    f"{piece.dtype} {piece.shape}. Are the files of one checkpoint?"
                )
        if name == first.name:
            return first
        return JoinedTensor(replace(first.info, name=name), [first], 0)
    if len(first.shape) <= dim:
        raise FormatError(
            f"{first.info.file}: tensor {name!r}: expected {len(spec.axes) if spec else 0} "
            f"dimensions, found shape {first.shape}. The file is damaged: fetch it again."
        )
    if len(pieces) == 1 and name == first.name:
        return first
    length = sum(piece.shape[dim] for piece in pieces if len(piece.shape) > dim)
    shape = (*first.shape[:dim], length, *first.shape[dim + 1 :])
    return JoinedTensor(replace(first.info, name=name, shape=shape), pieces, dim)
