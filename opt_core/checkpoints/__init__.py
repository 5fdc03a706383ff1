# SPDX-License-Identifier: Apache-2.0
"""Containers of weights: files of tensors, read lazily and written atomically.

What the tensors mean is no concern of this package: names, layouts and models are elsewhere.
"""

from opt_core.checkpoints.index import CheckpointIndex
from opt_core.checkpoints.layouts import LAYOUTS, SAFETENSORS, Layout
from opt_core.checkpoints.reader import CheckpointReader
from opt_core.checkpoints.tensors import LazyTensor, TensorInfo
from opt_core.checkpoints.writer import CheckpointWriter

__all__ = [
    "LAYOUTS",
    "SAFETENSORS",
    "CheckpointIndex",
    "CheckpointReader",
    "CheckpointWriter",
    "Layout",
    "LazyTensor",
    "TensorInfo",
]
