# SPDX-License-Identifier: Apache-2.0
"""Whatever lies in a directory: its tensors, and the configuration that says what they mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from opt_core.checkpoints import CheckpointReader
from opt_core.checkpoints.reader import find_weights
from opt_core.config import CONFIG_NAME, OPTConfig
from opt_core.metaseq import MetaseqReader, is_metaseq, open_metaseq


def open_weights(path: Path, prefer: str | None = None) -> CheckpointReader:
    """Opens a file of weights, an index of several, or a directory that holds one of these.

    Args:
        path: where they are.
        prefer: the framework ("pt", "tf", "flax") whose files are taken where there are several.

    Raises:
        CheckpointError: there are none.
        FormatError: a damaged or unsafe file.
        UnsupportedError: a library that the format needs is not installed.
    """
    if is_metaseq(path) and not (path.is_dir() and find_weights(path)):
        return open_metaseq(path)
    return CheckpointReader.open(path, prefer)


def find_config(
    given: OPTConfig | str | os.PathLike[str] | None,
    directory: Path,
    reader: CheckpointReader,
    **overrides: Any,
) -> OPTConfig | None:
    """The configuration given, else the one beside the weights, else what metaseq's say, else None.

    Args:
        given: a configuration, a file, a directory or a hub name.
        directory: where the weights are.
        reader: the weights.
        overrides: fields with other values.

    Raises:
        ConfigError: an invalid configuration.
        HubError: nothing found under the name given.
    """
    if isinstance(given, OPTConfig):
        return given.replace(**overrides)
    if given is not None and not Path(given).expanduser().is_file():
        named: OPTConfig = OPTConfig.from_pretrained(given, **overrides)
        return named
    file = directory / CONFIG_NAME if given is None else Path(given).expanduser()
    if file.is_file():
        return OPTConfig.from_json_file(file, **overrides)
    return reader.config.replace(**overrides) if isinstance(reader, MetaseqReader) else None
