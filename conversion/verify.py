# SPDX-License-Identifier: Apache-2.0
"""Checkpoints compared tensor by tensor, whatever formats they are in, a block at a time."""

from __future__ import annotations

import math
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conversion.checkpoint import Checkpoint, open_checkpoint
from conversion.plan import Work
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, ConfigError
from opt_core.loading import Source, match, pairs, separate_head
from opt_core.opening import open_weights
from opt_core.params import ARCHITECTURES
from opt_core.saving import Progress


@dataclass(frozen=True)
class TensorComparison:
    """One parameter in two checkpoints; the name is the canonical one."""

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]  # in canonical layout
    dtypes: tuple[str, str]
    equal: bool  # bit by bit, and in the same dtype
    difference: float  # the largest of two values; nan for shapes that differ, or for no number
    largest: float  # absolute value in the first


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints held against each other."""

    first: Path
    second: Path
    tensors: tuple[TensorComparison, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether both hold the same parameters, bit by bit."""
        return not self.only_first and not self.only_second and all(t.equal for t in self.tensors)


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    progress: Progress = lambda done, total: None,
) -> Comparison:
    """Compares two checkpoints; a tied head that one of them stores a second time does not count.

    Args:
        first: a directory, a file of weights, an index of several, or a hub name.
        second: likewise; where only one has a configuration, it serves both.
        progress: told of the bytes of the first that are compared.

    Raises:
        HubError: one of them cannot be found.
        ConfigError: neither has a configuration.
        CheckpointError: tensors that do not fit the configuration.
        FormatError: a damaged or unsafe file.
    """
    with open_checkpoint(first) as a, open_checkpoint(second) as b:
        config = a.config or b.config
        if config is None:
            raise ConfigError(
                f"{a.directory} and {b.directory}: expected a config.json in at least one of them, "
                "found none: without it the tensors' names cannot be told."
            )
        left, right = _parameters(a, a.config or config), _parameters(b, b.config or config)
        common = [name for name in left if name in right]
        total = sum(left[name].tensor.info.nbytes for name in common)
        done = 0
        tensors = []
        for name in common:
            tensors.append(_compare(left[name], right[name]))
            done += left[name].tensor.info.nbytes
            progress(done, total)
        return Comparison(
            a.directory,
            b.directory,
            tuple(tensors),
            tuple(name for name in left if name not in right),
            tuple(name for name in right if name not in left),
        )


def check_written(work: Work, folder: Path, progress: Progress) -> None:
    """Reads back what a conversion wrote; raises CheckpointError if anything differs from its source."""
    total = work.plan.bytes_written
    done = 0
    with closing(open_weights(folder)) as reader:
        written, report = match(work.config, work.plan.architecture, reader)
        report.check(where=folder)
        for out in work.outgoing:
            name = out.param.name
            expected = out.source().blocks(False, out.dtype)
            found = written[name].blocks(False) if name in written else iter(())
            if not all(_same_bits(x, y) for x, y in pairs(expected, found)):
                raise CheckpointError(
                    f"{name}: expected to read back what was written, found other values. Nothing "
                    "was converted. Is the disk sound?"
                )
            done += math.prod(out.param.shape) * out.dtype.itemsize
            progress(done, total)


def check_tied_head(checkpoint: Checkpoint, config: OPTConfig) -> None:
    """Raises CheckpointError for a head that is stored, tied, and not the embedding: it would be lost."""
    name = separate_head(config, checkpoint.reader)
    if name is not None:
        raise CheckpointError(
            f"{checkpoint.directory}: expected {name} to be the embedding again, as "
            "tie_word_embeddings in config.json says, found other values. Set it to false to "
            "keep this head, or remove the tensor."
        )


def _parameters(checkpoint: Checkpoint, config: OPTConfig) -> dict[str, Source]:
    """Every parameter that a checkpoint holds, of whatever class of model.

    A head that is stored and not the embedding is one, whatever the configuration says.
    """
    if separate_head(config, checkpoint.reader) is not None:
        config = config.replace(tie_word_embeddings=False)
    found, report = match(config, checkpoint.architecture, checkpoint.reader)
    report.check(where=checkpoint.directory)
    used = {source.tensor.name for source in found.values()}
    for architecture in ARCHITECTURES:
        for name, source in match(config, architecture, checkpoint.reader)[0].items():
            if source.tensor.name not in used:
                found[name] = source
    return found


def _compare(first: Source, second: Source) -> TensorComparison:
    shapes = first.shape, second.shape
    dtypes = str(first.tensor.dtype), str(second.tensor.dtype)
    if first.shape != second.shape:
        return TensorComparison(first.param.name, shapes, dtypes, False, math.nan, math.nan)
    equal, difference, largest = dtypes[0] == dtypes[1], 0.0, 0.0
    for x, y in pairs(first.blocks(False), second.blocks(False)):
        same = _same_bits(x, y)
        equal = equal and same
        left = x.astype(np.float64)
        largest = float(np.maximum(largest, np.abs(left).max(initial=0)))
        if not same:
            difference = float(np.maximum(difference, _apart(left, y.astype(np.float64))))
    return TensorComparison(first.param.name, shapes, dtypes, equal, difference, largest)


def _apart(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The largest difference; equal infinities, and two that are no numbers, do not differ."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(x - y)
    apart[(x == y) | (np.isnan(x) & np.isnan(y))] = 0
    return float(apart.max(initial=0))


def _same_bits(x: NDArray[Any], y: NDArray[Any]) -> bool:
    return x.dtype == y.dtype and np.array_equal(x.view(np.uint8), y.view(np.uint8))
