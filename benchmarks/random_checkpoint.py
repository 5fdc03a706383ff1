# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints of any configuration with random values in which every tensor matters."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from opt_core import OPTConfig
from opt_core.checkpoints import CheckpointWriter, TensorInfo
from opt_core.dtypes import MODEL_DTYPES
from opt_core.params import Kind, Param, param_table

#: Mean and standard deviation by kind: norms and biases are far from their initial values.
DISTRIBUTIONS = {
    Kind.LINEAR: (0.0, 0.02),
    Kind.BIAS: (0.0, 0.1),
    Kind.EMBEDDING: (0.0, 0.1),
    Kind.NORM_SCALE: (1.0, 0.2),
    Kind.NORM_BIAS: (0.0, 0.1),
}


def random_values(param: Param, seed: int, scale: float = 1.0) -> np.ndarray:
    """Values that depend on the seed and the parameter's name only."""
    generator = np.random.default_rng([seed, zlib.crc32(param.name.encode())])
    mean, std = DISTRIBUTIONS[param.spec.kind]
    values = generator.standard_normal(param.shape, np.float32)
    values *= scale * std
    values += mean
    return values


def write_random_checkpoint(
    directory: Path,
    config: OPTConfig,
    *,
    seed: int = 0,
    scale: float = 1.0,
    dtype: str = "float32",
) -> None:
    """Writes config.json and the weights of an `OPTForCausalLM`, one tensor in memory."""
    directory.mkdir(parents=True, exist_ok=True)
    table = param_table(config)
    infos = [TensorInfo(p.name, MODEL_DTYPES[dtype], p.shape, directory) for p in table]
    with CheckpointWriter(directory, infos) as writer:
        for param, info in zip(table, infos, strict=True):
            writer.write(param.name, random_values(param, seed, scale).astype(info.dtype))
    config.replace(architectures=["OPTForCausalLM"], torch_dtype=dtype).save_pretrained(directory)
