# SPDX-License-Identifier: Apache-2.0
"""Any readable checkpoint to canonical safetensors, with its configuration and tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from opt_core.files import atomic_write, hidden_sibling
from opt_core.hub import TEXT_FILES
from opt_core.loading import Source, match
from opt_core.params import param_table

_COPIED = tuple(name for name in TEXT_FILES if name != CONFIG_NAME)

#: Called after each tensor with the bytes written so far and the bytes of all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote."""

    target: Path
    architecture: str
    assumption: str | None  # why the architecture is a guess; None where it is none
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

    No more than one tensor is in memory at a time. Everything is written under hidden names first,
    so a failure until then leaves `target` as it was; then the weights and the texts get their names
    one by one, and tokenizer and generation files of a former model that `source` lacks go.

    Args:
        source: a directory, a file of weights with its config.json beside it, or a hub name.
        target: a directory, made if need be; `~` is the home directory.
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
    target = _checked_target(target, overwrite)
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
        texts = {name: checkpoint.directory / name for name in _COPIED}
        copies = {name: path.read_bytes() for name, path in texts.items() if path.is_file()}
        written = config.replace(architectures=[architecture], torch_dtype=str(infos[0].dtype))
        with (
            _texts(target, {CONFIG_NAME: written.to_json_string().encode(), **copies}) as finish,
            CheckpointWriter(target, infos, max_shard_size=max_shard_size) as writer,
        ):
            for info, array in zip(infos, _arrays(sources, wanted), strict=True):
                writer.write(info.name, array)
                done += info.nbytes
                progress(done, total)
            finish()
        for name in _COPIED:
            if name not in copies:
                (target / name).unlink(missing_ok=True)
        assumption = checkpoint.assumption
    return Conversion(target, architecture, assumption, len(infos), total, tuple(copies))


def _checked_target(target: str | os.PathLike[str], overwrite: bool) -> Path:
    if not os.fspath(target):
        raise InputError("target: expected a directory to write into, found an empty name.")
    target = Path(target).expanduser()
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InputError(
            f"{target}: expected a new or empty directory, found files in it. Choose another, or "
            "allow overwriting (overwrite=True, --overwrite)."
        )
    return target


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


@contextmanager
def _texts(target: Path, contents: Mapping[str, bytes]) -> Iterator[Callable[[], None]]:
    """Gives a function that writes files under hidden names; they get their own at a good end."""
    hidden = {name: hidden_sibling(target / name) for name in contents}

    def discard() -> None:
        for path in hidden.values():
            path.unlink(missing_ok=True)

    def write() -> None:
        try:
            for name, content in contents.items():
                atomic_write(hidden[name], content)
        except BaseException:
            discard()  # now, so that the writer can remove the directory that it made
            raise

    try:
        yield write
        for name, path in hidden.items():
            os.replace(path, target / name)
    finally:
        discard()
