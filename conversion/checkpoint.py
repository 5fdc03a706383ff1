# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as found: its files open, its configuration read, nothing held against the other yet."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from opt_core.checkpoints import CheckpointReader
from opt_core.config import CONFIG_NAME, OPTConfig
from opt_core.hub import resolve
from opt_core.loading import named_architecture
from opt_core.opening import find_config, open_weights
from opt_core.staging import complete

DEFAULT_ARCHITECTURE = "OPTForCausalLM"


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; a context manager that closes its files."""

    directory: Path
    config: OPTConfig | None  # None where there is no config.json beside the weights
    reader: CheckpointReader

    @property
    def architecture(self) -> str:
        """The class of model that the configuration names, by its name in PyTorch, or a guess."""
        return self._named or DEFAULT_ARCHITECTURE

    @property
    def assumption(self) -> str | None:
        """Why `architecture` is a guess; None where the configuration names it, or there is none."""
        if self.config is None or self._named:
            return None
        named = ", ".join(self.config.architectures or ()) or "none"
        return f"assumed: 'architectures' in {CONFIG_NAME} names no class of OPT model, but {named}"

    @property
    def _named(self) -> str | None:
        return named_architecture(self.config) if self.config else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.reader.close()


def open_checkpoint(
    source: str | os.PathLike[str],
    config: OPTConfig | str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Opens a directory, a file of weights, an index of several, or a model of the hub.

    Args:
        source: where the weights are.
        config: a configuration instead of the one beside them, or where to find one.

    Raises:
        HubError: nothing found under that name.
        ConfigError: an invalid config.json.
        CheckpointError: a directory without weights.
        FormatError: a damaged or unsafe file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        complete(path.parent)
    directory = path.parent if path.is_file() else resolve(source)
    reader = open_weights(path if path.is_file() else directory)
    with ExitStack() as undo:
        undo.callback(reader.close)
        found = find_config(config, directory, reader)
        undo.pop_all()
    return Checkpoint(directory, found, reader)
