# SPDX-License-Identifier: Apache-2.0
"""Any readable checkpoint to canonical safetensors, with its configuration and tokenizer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conversion.checkpoint import Checkpoint, open_checkpoint
from opt_core.checkpoints import CheckpointWriter, TensorInfo
from opt_core.config import CONFIG_NAME, OPTConfig
from opt_core.dtypes import MODEL_DTYPES, dtype_name
from opt_core.errors import CheckpointError, ConfigError, InputError
from opt_core.hub import TEXT_FILES
from opt_core.loading import Source, match
from opt_core.params import param_table

#: Called after each tensor with the bytes written so far and the bytes of all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote."""

    target: Path
    architecture: str
    tensors: int
    nbytes: int
    copied: tuple[str, ...]  # tokenizer and generation files, by name


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Writes `source` into the directory `target` under the canonical names and in their layout.

    No more than one tensor is in memory at a time. What stood in `target` stays until all weights
    are written.

    Args:
        source: a directory, a file of weights with its config.json beside it, or a hub name.
        target: a directory, made if need be.
        dtype: of the written tensors, such as "bfloat16"; None keeps each tensor's own.
        max_shard_size: bytes, or such as "5GB"; a larger model is written as shards with an index.
        overwrite: allows a target that is not empty.
        progress: told of the bytes written after each tensor.

    Raises:
        HubError: the source cannot be found.
        ConfigError: it has no valid config.json.
        CheckpointError: its tensors do not fit the configuration, or a value does not fit `dtype`.
        FormatError: a damaged or unsafe file.
        InputError: a target that is not empty, or an option that makes no sense.
    """
    target = Path(target)
    _check_target(target, overwrite)
    wanted = None if dtype is None else MODEL_DTYPES[dtype_name(dtype)]
    with open_checkpoint(source) as checkpoint:
        config, architecture = _config(checkpoint), checkpoint.architecture
        sources = _sources(checkpoint, config, architecture)
        infos = [
            TensorInfo(name, wanted or s.tensor.dtype, s.shape, target)
            for name, s in sources.items()
        ]
        total = sum(info.nbytes for info in infos)
        done = 0
        with CheckpointWriter(target, infos, max_shard_size=max_shard_size) as writer:
            for info, array in zip(infos, _arrays(sources, wanted), strict=True):
                writer.write(info.name, array)
                done += info.nbytes
                progress(done, total)
        written = config.replace(architectures=[architecture], torch_dtype=str(infos[0].dtype))
        written.save_pretrained(target)
        copied = tuple(_copy_texts(checkpoint.directory, target))
    return Conversion(target, architecture, len(infos), total, copied)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InputError(
            f"{target}: expected a new or empty directory, found files in it. Choose another, or "
            "allow overwriting (overwrite=True, --overwrite)."
        )


def _config(checkpoint: Checkpoint) -> OPTConfig:
    if checkpoint.config is None:
        raise ConfigError(
            f"{checkpoint.directory}: expected {CONFIG_NAME} beside the weights, found none. Put "
            "the model's there: without it the tensors cannot be checked."
        )
    return checkpoint.config


def _sources(checkpoint: Checkpoint, config: OPTConfig, architecture: str) -> dict[str, Source]:
    """Where each parameter lies, in table order; all of them, and nothing beside them."""
    sources, report = match(config, architecture, checkpoint.reader)
    report.check(ignore_mismatched_sizes=False, tolerate=False, where=checkpoint.directory)
    lost = (*report.missing_head, *report.other_heads)
    if lost:
        raise CheckpointError(
            f"{checkpoint.directory}: expected the tensors of an {architecture} and no others, but "
            f"{', '.join(lost)} is missing or of another class. Correct 'architectures' in "
            f"{CONFIG_NAME}."
        )
    return {p.name: sources[p.name] for p in param_table(config, architecture)}


def _arrays(sources: dict[str, Source], dtype: np.dtype[Any] | None) -> Iterator[NDArray[Any]]:
    for name, source in sources.items():
        array = source.read("torch")
        yield array if dtype is None else _cast(name, array, dtype)


def _cast(name: str, array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all() and np.isfinite(array).all():
        raise CheckpointError(
            f"{name}: expected values that {dtype} can hold, found one of "
            f"{float(np.abs(array).max()):g}. Choose bfloat16 or float32."
        )
    return cast


def _copy_texts(source: Path, target: Path) -> Iterator[str]:
    for name in TEXT_FILES:
        if name != CONFIG_NAME and (source / name).is_file():
            if not (target / name).exists() or not (source / name).samefile(target / name):
                shutil.copyfile(source / name, target / name)
            yield name
