# SPDX-License-Identifier: Apache-2.0
"""Files of weights made from arrays, tensor by tensor and block by block, as a conversion does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.output import CreateFile
from opt_core.checkpoints.tensors import LazyTensor

Arrays = Mapping[str, NDArray[Any]]


def write_file(create: CreateFile, path: Path, arrays: Arrays, block: int = 64) -> Path:
    """Write a file of these arrays, which are given in blocks of about so many bytes."""
    tensors = [LazyTensor.from_array(name, array) for name, array in arrays.items()]
    path.unlink(missing_ok=True)
    file = create(path, tensors, {"format": "pt"})
    for tensor in tensors:
        file.write(tensor.name, tensor.blocks(block))
    file.finish()
    file.close()
    return path


def some(*dtypes: np.dtype[Any]) -> dict[str, NDArray[Any]]:
    """Return arrays of each dtype: a matrix, a vector, a scalar, an empty one, one of five dims."""
    shapes = ((3, 5), (70,), (), (0, 4), (2, 1, 3, 1, 2))
    return {
        f"model.{dtype}.{'x'.join(map(str, shape)) or 'scalar'}": np.random.default_rng(dim)
        .integers(0, 2, shape)
        .astype(dtype)
        for dtype in dtypes
        for dim, shape in enumerate(shapes)
    }


TORCH_DTYPES = tuple(
    np.dtype(dtype)
    for dtype in (
        *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16),
        *(np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_),
    )
)
