# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as found: its files open, its configuration read, nothing held against the other yet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from opt_core.checkpoints import CheckpointReader
from opt_core.config import CONFIG_NAME, OPTConfig
from opt_core.files import FileState, file_state, read_text_file
from opt_core.hub import resolve
from opt_core.loading import named_architecture
from opt_core.opening import find_config, open_weights
from opt_core.snapshot import read_together

DEFAULT_ARCHITECTURE = "OPTForCausalLM"


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; a context manager that closes its files.

    If one was written to meanwhile, a good end is a CheckpointError.
    """

    directory: Path
    config: OPTConfig | None  # None where there is no config.json beside the weights
    reader: CheckpointReader
    texts: Mapping[str, bytes] = field(default_factory=dict)  # small files beside them, by name
    states: tuple[FileState, ...] = ()  # of the reader's files when they were opened

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
        self.reader.__exit__(kind, error, traceback)


def open_checkpoint(
    source: str | os.PathLike[str],
    config: OPTConfig | str | os.PathLike[str] | None = None,
    texts: Sequence[str] = (),
) -> Checkpoint:
    """Opens a directory, a file of weights, an index of several, or a model of the hub.

    Args:
        source: where the weights are.
        config: a configuration instead of the one beside them, or where to find one.
        texts: names of small files to read along, where they are there.

    Raises:
        HubError: nothing found under that name.
        ConfigError: an invalid config.json.
        CheckpointError: a directory without weights, or one that others keep writing to.
        FormatError: a damaged or unsafe file.
    """
    path = Path(source).expanduser()
    directory = path.parent if path.is_file() else resolve(source)
    weights = path if path.is_file() else directory

    def read(stack: ExitStack) -> Checkpoint:
        reader = stack.enter_context(closing(open_weights(weights)))
        found = find_config(config, directory, reader)
        files = {name: directory / name for name in texts}
        contents = {name: read_text_file(f) for name, f in files.items() if f.is_file()}
        return Checkpoint(directory, found, reader, contents, tuple(map(file_state, reader.files)))

    return read_together(directory, read)
