# SPDX-License-Identifier: Apache-2.0
"""Any readable checkpoint to any format that can be written, with its configuration and tokenizer."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conversion.checkpoint import open_checkpoint
from conversion.plan import COPIED, Plan, Work, make_plan
from conversion.verify import check_tied_head, check_written
from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.files import atomic_write
from opt_core.formats import DEFAULT_FORMAT, find_format
from opt_core.saving import Progress, write_weights
from opt_core.staging import PARTIAL, staged


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote, as it was planned."""

    target: Path
    plan: Plan
    verified: bool  # read back and found equal


def plan(
    source: str | os.PathLike[str],
    *,
    to: str = DEFAULT_FORMAT,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    architecture: str | None = None,
    config: OPTConfig | str | os.PathLike[str] | None = None,
) -> Plan:
    """Says what `convert` with the same arguments would do; reads headers only, writes nothing."""
    find_format(to)
    with open_checkpoint(source, config, COPIED) as checkpoint:
        return make_plan(
            checkpoint,
            to,
            dtype=dtype,
            max_shard_size=max_shard_size,
            architecture=architecture,
        ).plan


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str = DEFAULT_FORMAT,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    architecture: str | None = None,
    config: OPTConfig | str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = False,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Writes `source` into the directory `target` in another format.

    No more than one tensor is in memory at a time. The target appears whole or not at all: see
    `opt_core.staging`.

    Args:
        source: a directory, a file of weights, an index of several, or a hub name.
        target: a directory, made if need be; `~` is the home directory.
        to: a name of `opt_core.formats.FORMATS`.
        dtype: of the written tensors, such as "bfloat16"; None keeps each tensor's own.
        max_shard_size: bytes, or such as "5GB"; a larger model is written as shards with an index.
        architecture: the class of model to write, by its name in PyTorch; None: the one that the
            configuration names. Parameters of its head that the source lacks are left out and
            reported, and so are those of another class's head.
        config: a configuration instead of the source's own, or where to find one.
        overwrite: allows a target that is not empty: a model in it goes, weights of whatever format
            too; its tokenizer only if the source brings one.
        resume: after a failure keeps the files that are complete, and begins with those of an
            earlier try.
        verify: reads everything back, and compares it with the source, before the target appears.
        progress: told of the bytes written while they are, and then of those read back.

    Raises:
        HubError: the source cannot be found.
        ConfigError: it has no valid config.json.
        CheckpointError: its tensors do not fit the configuration, a value does not fit `dtype`, what
            was read back differs, or the source was written to meanwhile.
        FormatError: a damaged or unsafe file.
        InputError: a target that is not empty, or an option that makes no sense.
        UnsupportedError: a library that the format needs is not installed.
        OSError: as the system says, such as a full disk.
    """
    target = _checked_target(target, overwrite)
    find_format(to)
    with open_checkpoint(source, config, COPIED) as checkpoint:
        work = make_plan(
            checkpoint,
            to,
            dtype=dtype,
            max_shard_size=max_shard_size,
            architecture=architecture,
        )
        check_tied_head(checkpoint, work.config)
        with (
            _naming(target, work.plan),
            staged(
                target,
                obsolete=lambda name: name not in COPIED or bool(work.plan.copied),
                plan=work.fingerprint(),
                resume=resume,
            ) as folder,
        ):
            _write(work, checkpoint.texts, folder, max_shard_size, progress)
            if verify:
                check_written(work, folder, progress)
            checkpoint.reader.check()  # before anything appears
    return Conversion(target, work.plan, verify)


@contextmanager
def _naming(target: Path, plan: Plan) -> Iterator[None]:
    """Says of a full disk which one it is, and how much room there should be."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = f"{error.strerror}: the conversion takes {plan.bytes_written} bytes beside"
        raise OSError(error.errno, message, str(target)) from error


def _write(
    work: Work,
    texts: Mapping[str, bytes],
    folder: Path,
    max_shard_size: int | str,
    progress: Progress,
) -> None:
    for name, content in texts.items():
        atomic_write(folder / name, content)
    architecture = work.plan.architecture
    dtype = str(work.outgoing[0].dtype)
    work.config.replace(architectures=[architecture], torch_dtype=dtype).save_pretrained(folder)
    write_weights(
        folder,
        work.outgoing,
        find_format(work.plan.to),
        architecture,
        max_shard_size=max_shard_size,
        progress=progress,
    )


def _checked_target(target: str | os.PathLike[str], overwrite: bool) -> Path:
    if not os.fspath(target):
        raise InputError("target: expected a directory to write into, found an empty name.")
    path = Path(target).expanduser()
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path}: expected a directory to write into, found a link to nothing.")
    if path.is_dir() and not overwrite and {e.name for e in path.iterdir()} - {PARTIAL}:
        raise InputError(
            f"{path}: expected a new or empty directory, found files in it. Choose another, or "
            "allow overwriting (overwrite=True, --overwrite)."
        )
    return path
