# SPDX-License-Identifier: Apache-2.0
"""What a conversion will do, told from headers alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from conversion.checkpoint import Checkpoint
from opt_core import __version__
from opt_core.checkpoints.output import TensorLike, nbytes
from opt_core.checkpoints.tensors import BLOCK
from opt_core.checkpoints.writer import Shard, split
from opt_core.config import CONFIG_NAME, OPTConfig
from opt_core.dtypes import MODEL_DTYPES, dtype_name
from opt_core.errors import CheckpointError, ConfigError, InputError
from opt_core.files import TEXT_FILES, FileState
from opt_core.formats import find_format
from opt_core.loading import Source, match
from opt_core.params import ARCHITECTURES, param_table
from opt_core.saving import Outgoing

COPIED = tuple(name for name in TEXT_FILES if name != CONFIG_NAME)


@dataclass(frozen=True)
class Plan:
    """A conversion before it begins; bytes are those of tensors' values."""

    source: Path
    container: str  # of the source's files
    to: str  # name of the target's format
    architecture: str
    assumption: str | None  # why the architecture is a guess; None where it is none
    tensors: int
    dtypes: tuple[str, ...]  # that are written
    bytes_read: int
    bytes_written: int
    peak_bytes: int  # of memory, beyond what the interpreter takes
    files_read: tuple[str, ...]
    files_open: int  # of these, at most, at a time
    files_written: tuple[str, ...]
    copied: tuple[str, ...]  # of these, tokenizer and generation files
    missing: tuple[str, ...]  # of the head: not in the source, so not in the target
    dropped: tuple[str, ...]  # of another class's head: in the source only


@dataclass(frozen=True)
class Work:
    """A plan with what it takes to carry it out."""

    plan: Plan
    config: OPTConfig
    outgoing: tuple[Outgoing, ...]
    shards: tuple[Shard, ...]
    states: tuple[FileState, ...]  # of the files read

    def fingerprint(self) -> str:
        """Equal only for two that write the same tensors to the same files, from the same files."""
        states = [(size, time) for _, _, size, time in self.states]
        places = [(shard.filename, [_row(info) for info in shard.infos]) for shard in self.shards]
        content = [__version__, asdict(self.plan), states, places]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def make_plan(
    checkpoint: Checkpoint,
    to: str,
    *,
    dtype: str | None,
    max_shard_size: int | str,
    architecture: str | None,
) -> Work:
    """Holds a checkpoint against the table, and says what it becomes.

    Raises:
        InputError: an unknown format, dtype, size or class of model.
        ConfigError: no configuration.
        CheckpointError: tensors that do not fit the configuration.
    """
    format = find_format(to)
    wanted = None if dtype is None else MODEL_DTYPES[dtype_name(dtype)]
    config = _config(checkpoint)
    chosen = _architecture(checkpoint, architecture)
    sources, missing, dropped = _sources(checkpoint, config, chosen, given=architecture is not None)
    outgoing = tuple(Outgoing.of(s, wanted or s.tensor.dtype) for s in sources)
    directory = checkpoint.directory
    infos = [out.info(format, chosen, directory) for out in outgoing]
    shards = split(infos, format.layout, max_shard_size)
    weights = [shard.filename for shard in shards]
    if len(weights) > 1 and format.layout.index:
        weights.append(format.layout.index)
    texts = tuple(checkpoint.texts)
    plan = Plan(
        source=directory,
        container=checkpoint.reader.container,
        to=to,
        architecture=chosen,
        assumption=None if architecture else checkpoint.assumption,
        tensors=len(infos),
        dtypes=tuple(sorted({str(info.dtype) for info in infos})),
        bytes_read=sum(s.tensor.info.nbytes for s in sources),
        bytes_written=sum(map(nbytes, infos)),
        peak_bytes=max(
            _memory(s, out, format.dialect.transposed(s.param))
            for s, out in zip(sources, outgoing, strict=True)
        ),
        files_read=tuple(str(file) for file in checkpoint.reader.files),
        files_open=checkpoint.reader.files_open,
        files_written=(*weights, CONFIG_NAME, *texts),
        copied=texts,
        missing=missing,
        dropped=dropped,
    )
    return Work(plan, config, outgoing, tuple(shards), checkpoint.states)


def _config(checkpoint: Checkpoint) -> OPTConfig:
    if checkpoint.config is None:
        raise ConfigError(
            f"{checkpoint.directory}: expected {CONFIG_NAME} beside the weights, found none. Put "
            "the model's there, or name one (config=, --config): without it the tensors cannot be checked."
        )
    return checkpoint.config


def _architecture(checkpoint: Checkpoint, given: str | None) -> str:
    if given is not None and given not in ARCHITECTURES:
        raise InputError(
            f"Unknown architecture {given!r}: expected one of {', '.join(ARCHITECTURES)}."
        )
    return given or checkpoint.architecture


def _sources(
    checkpoint: Checkpoint, config: OPTConfig, architecture: str, *, given: bool
) -> tuple[list[Source], tuple[str, ...], tuple[str, ...]]:
    """Where each parameter lies, in table order; what of a head is missing; what is left out.

    Tensors of another class's head are left out only if the class was `given`.
    """
    sources, report = match(config, architecture, checkpoint.reader)
    report.check(where=checkpoint.directory)
    if report.other_heads and not given:
        raise CheckpointError(
            f"{checkpoint.directory}: expected the tensors of an {architecture} and no others, but "
            f"{', '.join(report.other_heads)} belongs to another class. Correct 'architectures' in "
            f"{CONFIG_NAME}, or name the class to convert to (architecture=, --architecture), which "
            "leaves it out."
        )
    found = [sources[p.name] for p in param_table(config, architecture) if p.name in sources]
    return found, report.missing_head, report.other_heads


def _memory(source: Source, out: Outgoing, transposed: bool) -> int:
    """Bytes that converting one tensor takes: blocks read and cast, and what must be there whole."""
    tensor = source.tensor
    blocks = 4 * BLOCK  # one is written while the next is read
    if out.dtype != tensor.dtype:
        blocks += 2 * BLOCK * out.dtype.itemsize // tensor.dtype.itemsize
    whole = source.turns(transposed) or not tensor.streams
    return blocks + (tensor.info.nbytes if whole else 0)


def _row(info: TensorLike) -> tuple[str, str, tuple[int, ...]]:
    return info.name, str(info.dtype), tuple(info.shape)
