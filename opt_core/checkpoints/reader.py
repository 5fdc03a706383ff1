# SPDX-License-Identifier: Apache-2.0
"""Open a checkpoint, whatever container it is in and however many files it has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from opt_core.checkpoints import safetensors_format, torch_format
from opt_core.checkpoints.index import SUFFIX, CheckpointIndex
from opt_core.checkpoints.tensors import FileSource, LazyTensor
from opt_core.errors import CheckpointError, FormatError

Contents = tuple[list[LazyTensor], dict[str, str]]


@dataclass(frozen=True)
class Container:
    """A kind of file: its name, the file it has in a directory, how to tell it, how to read it.

    `matches` gets the first 512 bytes; `read` returns the tensors and the file's own metadata.
    """

    format: str
    filename: str
    matches: Callable[[bytes], bool]
    read: Callable[[FileSource], Contents]


CONTAINERS = (
    Container(
        "safetensors",
        "model.safetensors",
        safetensors_format.matches,
        safetensors_format.read_safetensors,
    ),
    Container("torch", "pytorch_model.bin", torch_format.matches, torch_format.read_torch),
)
"""Every kind of file that can be read, in the order in which a directory is searched."""


class CheckpointReader(Mapping[str, LazyTensor]):
    """The tensors of a checkpoint by name: open files, nothing read but their headers.

    A context manager. After `close`, tensors can no longer be read; arrays already mapped or read
    stay valid.

    Attributes:
        format: "safetensors" or "torch".
        metadata: what the files say of themselves; {} where the format has no room for it.
        files: the files that hold the tensors.
    """

    def __init__(self, sources: list[FileSource], index: CheckpointIndex | None) -> None:
        self._sources = sources
        self._tensors: dict[str, LazyTensor] = {}
        self.files = tuple(source.path for source in sources)
        self.metadata: dict[str, str] = {}
        formats: dict[str, Path] = {}
        for source in sources:
            container = _recognise(source)
            formats.setdefault(container.format, source.path)
            tensors, metadata = container.read(source)
            self.metadata.update(metadata)
            for tensor in tensors:
                self._add(tensor)
        if len(formats) > 1:
            found = ", ".join(f"{kind} in {file.name}" for kind, file in formats.items())
            raise FormatError(f"{self.files[0].parent}: expected one format, found {found}.")
        (self.format,) = formats
        if index is not None:
            _check_index(index, self._tensors)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> CheckpointReader:
        """Open a file of weights, an index of several, or a directory that holds one of these.

        Raises CheckpointError if there is none, FormatError if one is damaged or lies about itself.
        """
        file = _find(Path(path))
        index = CheckpointIndex.read(file) if file.name.endswith(SUFFIX) else None
        with ExitStack() as undo:
            sources: list[FileSource] = []
            for shard in index.shards if index else (file,):
                sources.append(FileSource(shard))
                undo.callback(sources[-1].close)
            reader = cls(sources, index)
            undo.pop_all()
        return reader

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; may be called twice."""
        for source in self._sources:
            source.close()

    def _add(self, tensor: LazyTensor) -> None:
        other = self._tensors.setdefault(tensor.name, tensor)
        if other is not tensor:
            raise FormatError(
                f"{tensor.info.file}: tensor {tensor.name!r}: expected it in one file, found it in "
                f"{other.info.file.name} too. Fetch the checkpoint again."
            )


def _find(path: Path) -> Path:
    """Return the file to begin with."""
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a file or a directory, found none there.")
        return path
    names = [name + end for name in (c.filename for c in CONTAINERS) for end in ("", SUFFIX)]
    for name in names:
        if (path / name).is_file():
            return path / name
    present = sorted(entry.name for entry in path.iterdir())
    listing = ", ".join(present[:12]) + (", ..." if len(present) > 12 else "")
    raise CheckpointError(
        f"{path}: expected one of {', '.join(names)}; found {listing or 'an empty directory'}. "
        f"Give the directory that holds the weights, or the file itself.{_hint(present)}"
    )


def _hint(present: list[str]) -> str:
    unread = [name for name in ("tf_model.h5", "flax_model.msgpack") if name in present]
    return f" {' and '.join(unread)} cannot be read by this release." if unread else ""


def _recognise(source: FileSource) -> Container:
    """Tell a file's container from its content; its name proves nothing."""
    head = source.read_bytes(0, 512)
    for container in CONTAINERS:
        if container.matches(head):
            return container
    if head.startswith(b"version https://git-lfs"):
        raise FormatError(
            f"{source.path}: expected weights, found a Git LFS pointer: the repository was cloned "
            "without its large files. Run `git lfs pull` there, or use the hub name."
        )
    kinds = " or ".join(container.format for container in CONTAINERS)
    raise FormatError(
        f"{source.path}: expected {kinds}, found {source.size} bytes that begin with {head[:16]!r}"
        ". The file is damaged, its download incomplete, or it is something else: fetch it again."
    )


def _check_index(index: CheckpointIndex, tensors: Mapping[str, LazyTensor]) -> None:
    """Check that the index names exactly what the files hold, and where."""
    for name, file in index.weight_map.items():
        if name not in tensors or tensors[name].info.file.name != file:
            found = f"it in {tensors[name].info.file.name}" if name in tensors else "it nowhere"
            raise FormatError(
                f"{index.file}: tensor {name!r}: expected in {file}, found {found}. Index and "
                "files are not of one checkpoint: fetch them together."
            )
    unlisted = [name for name in tensors if name not in index.weight_map]
    if unlisted:
        raise FormatError(
            f"{index.file}: expected every tensor of its files, found {unlisted[0]!r} of "
            f"{tensors[unlisted[0]].info.file.name} missing ({len(unlisted)} in all). Index and "
            "files are not of one checkpoint: fetch them together."
        )
