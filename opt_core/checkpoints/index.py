# SPDX-License-Identifier: Apache-2.0
"""The index of a checkpoint in several files: which tensor lies in which file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

from opt_core.checkpoints.tensors import FileSource
from opt_core.errors import FormatError
from opt_core.files import JSON_LIMIT, parse_json_object

SUFFIX = ".index.json"


@dataclass(frozen=True)
class CheckpointIndex:
    """A `*.index.json`: names of tensors and of the files beside it that hold them."""

    file: Path
    weight_map: Mapping[str, str]
    total_size: int | None = None

    @classmethod
    def read(cls, file: Path) -> CheckpointIndex:
        """Read an index; raises FormatError unless it names plain files that stand beside it.

        A named file may be a symbolic link (the hub's cache is made of them): only the names in
        the index come from strangers.
        """
        source = FileSource(file)
        try:
            if source.size > JSON_LIMIT:
                raise FormatError(
                    f"{file}: expected an index of at most {JSON_LIMIT} bytes, found {source.size}."
                )
            content = parse_json_object(source.read_bytes(0, source.size), str(file))
        finally:
            source.close()
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(
                f"{file}: expected 'weight_map' to map tensor names to file names, found "
                f"{type(weight_map).__name__}. Fetch the index again."
            )
        for tensor, name in weight_map.items():
            _check_name(file, tensor, name)
        for name in dict.fromkeys(weight_map.values()):
            _check_present(file, name, weight_map)
        metadata = content.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        return cls(file, MappingProxyType(weight_map), total if type(total) is int else None)

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files named, each once, sorted by name."""
        return tuple(self.file.with_name(name) for name in sorted(set(self.weight_map.values())))

    def to_json(self) -> str:
        """Return the index as the text of its file."""
        content = {
            "metadata": {"total_size": self.total_size},
            "weight_map": dict(sorted(self.weight_map.items())),
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _check_name(file: Path, tensor: str, name: Any) -> None:
    plain = (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and "\0" not in name
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
    )
    if not plain:
        raise FormatError(
            f"{file}: tensor {tensor!r}: expected the plain name of a file beside the index, found "
            f"{str(name)[:200]!r}. Nothing was opened; do not trust this checkpoint."
        )


def _check_present(file: Path, name: str, weight_map: dict[str, str]) -> None:
    if not file.with_name(name).is_file():
        tensor = next(tensor for tensor, shard in weight_map.items() if shard == name)
        raise FormatError(
            f"{file}: tensor {tensor!r}: expected the file {name} beside the index, found none. "
            "The download is incomplete: fetch the missing file."
        )
