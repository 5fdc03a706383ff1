# SPDX-License-Identifier: Apache-2.0
"""Writing, reading and comparing small checkpoints in the tests of readers and writers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from strategies import same

from opt_core.checkpoints import (
    SAFETENSORS,
    CheckpointReader,
    CheckpointWriter,
    Layout,
    LazyTensor,
)
from opt_core.staging import staged

Arrays = dict[str, NDArray[Any]]

BINS = Path(__file__).parents[1] / "golden" / "torch_bins"
WEIGHTS: Arrays = {f"layer.{n}": np.full((2, 3), n, np.float32) for n in range(5)}
OTHERS: Arrays = {f"other.{n}": np.full((4,), n, np.float16) for n in range(3)}


def write(
    directory: Path, tensors: Arrays, size: int | str = "5GB", layout: Layout = SAFETENSORS
) -> None:
    """Save over what is there, as models are saved."""
    infos = [LazyTensor.from_array(name, array) for name, array in tensors.items()]
    with (
        staged(directory, obsolete=layout.owns) as folder,
        CheckpointWriter(folder, infos, layout, max_shard_size=size) as writer,
    ):
        for name, array in tensors.items():
            writer.write(name, array)


def read(path: Path) -> Arrays:
    """Every tensor of a checkpoint."""
    with CheckpointReader.open(path) as reader:
        return {name: tensor.read() for name, tensor in reader.items()}


def equal(left: Arrays, right: Arrays) -> bool:
    """Whether names, dtypes, shapes and bits are the same."""
    return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)


def listing(directory: Path) -> list[str]:
    """The names in a directory."""
    return sorted(entry.name for entry in directory.iterdir())
