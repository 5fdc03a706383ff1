# SPDX-License-Identifier: Apache-2.0
"""Open a checkpoint of metaseq: headers of all its files now, values when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Self

from opt_core.checkpoints import torch_format
from opt_core.checkpoints.reader import CheckpointReader
from opt_core.checkpoints.sources import FileSource
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.config import OPTConfig
from opt_core.metaseq.config import Settings, config_beside, infer_config
from opt_core.metaseq.files import MAX_OPEN, Pool, candidates, find_grid
from opt_core.metaseq.parts import join_parts
from opt_core.metaseq.ranks import read_parts


class MetaseqReader(CheckpointReader):
    """The tensors of a metaseq checkpoint under metaseq's names, joined and unfused as they are read.

    Attributes:
        settings: what the training run's own configuration says beyond the shapes.
    """

    def __init__(
        self, tensors: Sequence[LazyTensor], sources: Sequence[FileSource], settings: Settings
    ) -> None:
        super().__init__("metaseq", tensors, sources)
        self.settings = settings

    @classmethod
    def open(cls, path: str | os.PathLike[str], prefer: str | None = None) -> Self:
        """Open the checkpoint in a directory, or the one that the file `path` belongs to.

        There is one kind to choose from, so `prefer` has no effect. Raises CheckpointError if there
        is none, or more than one in the directory, and FormatError if a file is missing, is damaged
        or does not fit the others.
        """
        grid = find_grid(Path(path))
        pool = Pool()
        with ExitStack() as undo:
            undo.callback(pool.close)
            parts, settings = read_parts(grid, pool)
            reader = cls(list(join_parts(parts)), pool.sources, settings)
            undo.pop_all()
        return reader

    @property
    def files_open(self) -> int:
        """How many files are open at a time, at most."""
        return min(len(self.files), MAX_OPEN)

    @cached_property
    def config(self) -> OPTConfig:
        """The config.json beside the files, else what tensors and settings tell.

        Raises ConfigError if that is not enough, CheckpointError if it is no model of OPT.
        """
        beside = config_beside(self.files[0].parent)
        return infer_config(self, self.settings) if beside is None else beside


def is_metaseq(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file, or one in a directory, bears a name that metaseq gives and is torch's."""
    path = Path(path)
    files = candidates(path) if path.is_dir() else [path] if path.suffix == ".pt" else []
    if not files or not files[0].is_file():
        return False
    with open(files[0], "rb") as file:
        return torch_format.matches(file.read(512))


def open_metaseq(path: str | os.PathLike[str]) -> MetaseqReader:
    """Open the checkpoint in a directory, or the one that the file `path` belongs to.

    Raises what `MetaseqReader.open` raises.
    """
    return MetaseqReader.open(path)
