# SPDX-License-Identifier: Apache-2.0
"""Open a checkpoint, whatever container it is in and however many files it has."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self

from opt_core.checkpoints.containers import recognise
from opt_core.checkpoints.index import CheckpointIndex
from opt_core.checkpoints.layouts import in_order
from opt_core.checkpoints.orbax_format import find_orbax, read_orbax
from opt_core.checkpoints.sources import FileSource, MappedFile, NamedFile
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.errors import CheckpointError, FormatError


class CheckpointReader(Mapping[str, LazyTensor]):
    """The tensors of a checkpoint by name: open files, nothing read but their headers.

    A context manager, whose good end is an error if a file was written to meanwhile. After `close`,
    tensors can no longer be read; arrays already mapped or read stay valid.

    Attributes:
        container: the kind of its files: "safetensors", "torch", ...
        metadata: what the files say of themselves; {} where the format has no room for it.
        files: the files that hold the tensors.
    """

    def __init__(
        self,
        container: str,
        tensors: Iterable[LazyTensor],
        sources: Sequence[FileSource] = (),
        metadata: Mapping[str, str] | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        self.container = container
        self.files = (*files, *(source.path for source in sources))
        self.metadata = dict(metadata or {})
        self._sources = sources
        self._tensors: dict[str, LazyTensor] = {}
        for tensor in tensors:
            self._add(tensor)

    @classmethod
    def open(cls, path: str | os.PathLike[str], prefer: str | None = None) -> Self:
        """Open a file of weights, an index of several, or a directory that holds one of these.

        Of several kinds in a directory the first in the order of `LAYOUTS` is opened; those that
        the framework `prefer` ("pt", "tf", "flax") writes come first.

        Raises CheckpointError if there is none, FormatError if one is damaged or lies about itself.
        """
        path = Path(path)
        found = find_weights(path, prefer) if path.is_dir() else path
        if found is None:
            raise _nothing_in(path)
        if not found.exists():
            raise CheckpointError(f"{path}: expected a file or a directory, found none there.")
        if found.is_dir():
            folder = find_orbax(found) or found
            tensors, metadata = read_orbax(folder)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            return cls("orbax", tensors, metadata=metadata, files=files)
        index = CheckpointIndex.read(found) if found.suffix == ".json" else None
        with ExitStack() as undo:
            sources = [
                undo.enter_context(closing(FileSource(file)))
                for file in (index.shards if index else (found,))
            ]
            reader = cls._read(sources)
            if index is not None:
                index.check({name: tensor.info.file.name for name, tensor in reader.items()})
            undo.pop_all()
        return reader

    @classmethod
    def _read(cls, sources: Sequence[FileSource]) -> Self:
        """Read the headers of files that are of one kind."""
        kinds = {source.path.name: recognise(source) for source in sources}
        names = {kind.name: file for file, kind in kinds.items()}
        if len(names) > 1:
            found = ", ".join(f"{kind} in {file}" for kind, file in names.items())
            raise FormatError(f"{sources[0].path.parent}: expected one format, found {found}.")
        metadata: dict[str, str] = {}
        tensors: list[LazyTensor] = []
        for source in sources:
            more, said = kinds[source.path.name].read(source)
            tensors += more
            metadata.update(said)
        (container,) = names
        return cls(container, tensors, sources, metadata)

    @property
    def files_open(self) -> int:
        """How many files are open at a time, at most."""
        return len(self._sources)

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
        try:
            if error is None:
                self.check()
        finally:
            self.close()

    def check(self) -> None:
        """Raise CheckpointError if a file was written to since it was opened."""
        for source in self._sources:
            source.check()

    @property
    def mapped(self) -> list[MappedFile]:
        """A record of each mapping that was made of the files."""
        return [mapped for source in self._sources for mapped in source.mapped]

    @property
    def named(self) -> list[NamedFile]:
        """A record of each file for who goes on reading it by its name."""
        return [source.named() for source in self._sources]

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


def find_weights(directory: Path, prefer: str | None = None) -> Path | None:
    """Return the file, index or folder in a directory to begin with; None if there is none.

    It may be the directory itself, or a folder in it of another name, where orbax has written it.
    """
    names = [name for layout in in_order(prefer) for name in (layout.single, layout.index) if name]
    files = (directory / name for name in names)
    return next((f for f in files if f.exists()), None) or find_orbax(directory)


def _nothing_in(directory: Path) -> CheckpointError:
    names = [name for layout in in_order() for name in (layout.single, layout.index) if name]
    present = sorted(entry.name for entry in directory.iterdir())
    listing = ", ".join(present[:12]) + (", ..." if len(present) > 12 else "")
    return CheckpointError(
        f"{directory}: expected one of {', '.join(names)}; found {listing or 'an empty directory'}. "
        "Give the directory that holds the weights, or the file itself."
    )
