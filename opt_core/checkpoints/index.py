# SPDX-License-Identifier: Apache-2.0
"""The index of a checkpoint in several files: which tensor lies in which file.

A key names a tensor, or the group that holds it, perhaps with the model's scope before it, and parts
names by dots or slashes: `model.decoder.embed_tokens.weight` (PyTorch), `model/decoder/fc1/kernel`
(Flax), `tfopt_for_causal_lm/model/decoder/layers.0/fc1/kernel:0` (TensorFlow, whose files lack the
scope), `/layers/tfopt_model/decoder/fc1/vars` (Keras).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from opt_core.checkpoints.sources import FileSource
from opt_core.errors import FormatError
from opt_core.files import JSON_LIMIT, parse_json_object, plain_name


@dataclass(frozen=True)
class CheckpointIndex:
    """The file of an index: keys, and the names of the files beside it that hold what they name."""

    file: Path
    weight_map: Mapping[str, str | list[str]]  # as in the file: one name, or several
    total_size: int | None = None

    @classmethod
    def build(
        cls, file: Path, places: Iterable[tuple[str, str]], total_size: int
    ) -> CheckpointIndex:
        """Make an index from a key and a file's name for each tensor; keys may come repeatedly."""
        files: defaultdict[str, dict[str, None]] = defaultdict(dict)
        for key, name in places:
            files[key][name] = None
        weight_map = {
            key: list(names) if len(names) > 1 else next(iter(names))
            for key, names in files.items()
        }
        return cls(file, MappingProxyType(weight_map), total_size)

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
        for key, names in weight_map.items():
            _check_names(file, key, names if isinstance(names, list) else [names])
        index = cls(file, MappingProxyType(weight_map))
        index._check_present()
        metadata = content.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        return replace(index, total_size=total if type(total) is int else None)

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files named, each once, sorted by name."""
        return tuple(self.file.with_name(name) for name in sorted(self._keys()))

    def check(self, places: Mapping[str, str]) -> None:
        """Check that the index names exactly the tensors that are there, and where.

        `places` gives for each tensor the name of its file. Raises FormatError.
        """
        exact = {_path(tensor): [tensor] for tensor in places}
        groups: defaultdict[str, list[str]] = defaultdict(list)
        for tensor in places:
            if group := _path(tensor).rpartition("/")[0]:
                groups[group].append(tensor)
        unlisted = dict(places)
        for key, value in self.weight_map.items():
            files = _names(value)
            paths = (_path(key), _path(key.partition("/")[2]))  # with and without a scope
            found = [named[path] for named in (exact, groups) for path in paths if path in named]
            tensors = found[0] if found else []
            holders = {places[tensor] for tensor in tensors}
            if holders != set(files):
                raise FormatError(
                    f"{self.file}: tensor {key!r}: expected in {' and '.join(files)}, found it "
                    f"{'in ' + ' and '.join(sorted(holders)) if holders else 'nowhere'}. Index and "
                    "files are not of one checkpoint: fetch them together."
                )
            for tensor in tensors:
                unlisted.pop(tensor, None)
        if unlisted:
            tensor, name = next(iter(unlisted.items()))
            raise FormatError(
                f"{self.file}: expected every tensor of its files, found {tensor!r} of {name} "
                f"missing ({len(unlisted)} in all). Index and files are not of one checkpoint: "
                "fetch them together."
            )

    def to_json(self) -> str:
        """Return the index as the text of its file."""
        content = {
            "metadata": {"total_size": self.total_size},
            "weight_map": dict(sorted(self.weight_map.items())),
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def _keys(self) -> dict[str, str]:
        """Return a key for each file that is named."""
        return {name: key for key, value in self.weight_map.items() for name in _names(value)}

    def _check_present(self) -> None:
        for name, key in self._keys().items():
            if not self.file.with_name(name).is_file():
                raise FormatError(
                    f"{self.file}: tensor {key!r}: expected the file {name} beside the index, found "
                    "none. The download is incomplete: fetch the missing file."
                )


def _path(name: str) -> str:
    return name.replace(".", "/")


def _names(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _check_names(file: Path, key: str, names: list[Any]) -> None:
    for name in names or [None]:
        if not plain_name(name):
            raise FormatError(
                f"{file}: tensor {key!r}: expected the plain name of a file beside the index, found "
                f"{str(name)[:200]!r}. Nothing was opened; do not trust this checkpoint."
            )
