# SPDX-License-Identifier: Apache-2.0
"""The files that checkpoints of each kind are made of, by the names that their makers give them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from opt_core.checkpoints.hdf5_writer import (
    create_keras_hdf5,
    create_tf_hdf5,
    keras_index_key,
    tf_index_key,
)
from opt_core.checkpoints.msgpack_writer import create_msgpack
from opt_core.checkpoints.orbax_writer import create_orbax
from opt_core.checkpoints.output import CreateFile
from opt_core.checkpoints.safetensors_format import create_safetensors
from opt_core.checkpoints.torch_writer import create_torch_zip


@dataclass(frozen=True)
class Layout:
    """How the weights of one kind are spread over files, and what writes them.

    Attributes:
        single: the file of a model that is in one.
        create: begins a file.
        shard: the name of one of several, with `{number}` and perhaps `{count}`.
        index: the index of several; None where there are no shards.
        first: the number of the first shard.
        metadata: what a file says of itself, where there is room for it.
        index_key: a tensor's name -> its key in the index.
        framework: the one whose own files these are, as in `from_tf`; none of them for safetensors.
    """

    single: str
    create: CreateFile
    shard: str = ""
    index: str | None = None
    first: int = 1
    metadata: Mapping[str, str] = field(default_factory=dict)
    index_key: Callable[[str], str] = lambda name: name
    framework: str | None = None

    def filename(self, number: int, count: int) -> str:
        """The name of the file `number`, counted from 0, of `count`."""
        if count == 1:
            return self.single
        return self.shard.format(number=number + self.first, count=count)

    def owns(self, filename: str) -> bool:
        """Whether a file of that name belongs to a checkpoint of this layout."""
        pattern = re.sub(r"\\{.*?\\}", r"\\d{5}", re.escape(self.shard))
        return filename in (self.single, self.index) or bool(re.fullmatch(pattern, filename))


SAFETENSORS = Layout(
    "model.safetensors",
    create_safetensors,
    "model-{number:05d}-of-{count:05d}.safetensors",
    "model.safetensors.index.json",
    metadata={"format": "pt"},  # other tools ask for it
)

TORCH = Layout(
    "pytorch_model.bin",
    create_torch_zip,
    "pytorch_model-{number:05d}-of-{count:05d}.bin",
    "pytorch_model.bin.index.json",
    framework="pt",
)
TF_HDF5 = Layout(
    "tf_model.h5",
    create_tf_hdf5,
    "tf_model-{number:05d}-of-{count:05d}.h5",
    "tf_model.h5.index.json",
    index_key=tf_index_key,
    framework="tf",
)
MSGPACK = Layout(
    "flax_model.msgpack",
    create_msgpack,
    "flax_model-{number:05d}-of-{count:05d}.msgpack",
    "flax_model.msgpack.index.json",
    index_key=lambda name: name.replace(".", "/"),
    framework="flax",
)
KERAS = Layout(
    "model.weights.h5",
    create_keras_hdf5,
    "model_{number:05d}.weights.h5",
    "model.weights.json",
    first=0,
    index_key=keras_index_key,
    framework="tf",
)
#: A folder of many files; it has no shards.
ORBAX = Layout("orbax", create_orbax, framework="flax")

#: In the order in which a directory is searched.
LAYOUTS = (SAFETENSORS, TORCH, TF_HDF5, MSGPACK, KERAS, ORBAX)


def in_order(prefer: str | None = None) -> list[Layout]:
    """The layouts in the order in which a directory is searched, a framework's own first."""
    return sorted(LAYOUTS, key=lambda layout: prefer is None or layout.framework != prefer)
