# SPDX-License-Identifier: Apache-2.0
"""The formats that checkpoints are written in: a layout of files and a dialect each, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from opt_core.checkpoints.layouts import (
    KERAS,
    LAYOUTS,
    MSGPACK,
    ORBAX,
    SAFETENSORS,
    TF_HDF5,
    TORCH,
    Layout,
)
from opt_core.checkpoints.torch_writer import create_torch_legacy
from opt_core.dialects import DIALECTS, Dialect
from opt_core.errors import InputError


@dataclass(frozen=True)
class Format:
    """A kind of checkpoint: what files it is made of, and how the names in them are spelt."""

    title: str
    layout: Layout
    dialect: Dialect


def _safetensors(dialect: str) -> Layout:
    return replace(SAFETENSORS, metadata={"format": dialect})


_PT, _TF, _FLAX, _KERAS = (DIALECTS[name] for name in ("pt", "tf", "flax", "keras"))

#: By the names that `--to` takes.
FORMATS: Mapping[str, Format] = {
    "safetensors": Format("safetensors with PyTorch's names, which all read", SAFETENSORS, _PT),
    "bin": Format("pytorch_model.bin, a zip archive", TORCH, _PT),
    "bin-legacy": Format(
        "pytorch_model.bin as before torch 1.6", replace(TORCH, create=create_torch_legacy), _PT
    ),
    "tf-safetensors": Format("safetensors with TensorFlow's names", _safetensors("tf"), _TF),
    "h5": Format("tf_model.h5", TF_HDF5, _TF),
    "keras": Format("model.weights.h5 of Keras 3", KERAS, _KERAS),
    "flax-safetensors": Format("safetensors with Flax's names", _safetensors("flax"), _FLAX),
    "msgpack": Format("flax_model.msgpack", MSGPACK, _FLAX),
    "orbax": Format("a folder of arrays, as orbax saves them", ORBAX, _FLAX),
}
DEFAULT_FORMAT = "safetensors"


def find_format(name: str) -> Format:
    """The format of that name; raises InputError for an unknown one."""
    if name not in FORMATS:
        raise InputError(f"Unknown format {name!r}: expected one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def shadows(layout: Layout, filename: str) -> bool:
    """Whether a file of that name would be read along with, or instead of, weights so laid out.

    Weights of kinds that come later when a directory is searched may stay beside the new ones.
    """
    last = next(i for i, other in enumerate(LAYOUTS) if other.single == layout.single)
    return any(other.owns(filename) for other in LAYOUTS[: last + 1])
