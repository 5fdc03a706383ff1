# SPDX-License-Identifier: Apache-2.0
"""Write an orbax directory: its tree of names, and each array as plain files of rows.

Of what orbax accepts the plainest is written: zarr of version 2 without compression and without a
database, so that no library is needed, the values pass block by block, and rows can be read again
without the rest. Arrays are said to be numpy's: they lie on no device, and orbax restores them
anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from opt_core.checkpoints.orbax_format import METADATA
from opt_core.checkpoints.output import Blocks, TensorLike, checked, write_pieces
from opt_core.checkpoints.tensors import BLOCK
from opt_core.checkpoints.zarr_format import DTYPES, METADATA_2, metadata_2
from opt_core.errors import InputError
from opt_core.files import plain_name, sync_directory, sync_file

_DICT_KEY = 2  # orbax's number for a key of a dict


class OrbaxFolder:
    """An orbax directory being written, a `WeightsFile`: see `create_orbax`."""

    def __init__(
        self, path: Path, infos: Sequence[TensorLike], metadata: Mapping[str, str]
    ) -> None:
        tree = {str(key): _entry(key, info) for key, info in _tree(infos)}
        self._path = path
        self._infos = {info.name: info for info in infos}
        self._files: list[Path] = []
        path.mkdir()
        content = {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": dict(metadata) or None,
        }
        self._write_text(path / METADATA, content)

    def write(self, name: str, blocks: Blocks) -> None:
        info = self._infos[name]
        chunks = _chunks(info)
        folder = self._path / name
        folder.mkdir()
        self._write_text(folder / METADATA_2, metadata_2(info.dtype, tuple(info.shape), chunks))
        left = chunk = math.prod(chunks) * info.dtype.itemsize
        files = self._chunk_files(folder, info, chunks)
        file: IO[bytes] | None = None
        try:
            for block in checked(info, blocks):
                while len(block):
                    file = file or next(files)
                    part, block = block[:left], block[left:]
                    write_pieces(file, part)
                    left -= len(part)
                    if not left:
                        file.close()
                        file, left = None, chunk
            if file is not None:
                file.truncate(chunk)  # a chunk at the end is as large as the others
        finally:
            if file is not None:
                file.close()

    def finish(self) -> None:
        folders = {file.parent for file in self._files}
        for path in self._files:
            with open(path, "rb+") as file:
                sync_file(file)
        for folder in folders:
            sync_directory(folder)

    def close(self) -> None:
        """Nothing is open between writes."""

    def _write_text(self, path: Path, content: Any) -> None:
        path.write_text(json.dumps(content), encoding="utf-8")
        self._files.append(path)

    def _chunk_files(
        self, folder: Path, info: TensorLike, chunks: tuple[int, ...]
    ) -> Iterator[IO[bytes]]:
        """Yield the files of an array, one for each run of rows."""
        rows = -(-info.shape[0] // chunks[0]) if chunks else 1
        for row in range(rows):
            name = ".".join(map(str, (row, *(0 for _ in chunks[1:]))))
            self._files.append(folder / name)
            yield open(folder / name, "xb")  # noqa: SIM115 - closed where it is filled


def create_orbax(
    path: Path, infos: Sequence[TensorLike], metadata: Mapping[str, str]
) -> OrbaxFolder:
    """Begin the directory `path`; names are keys joined with ".", as in Flax's safetensors.

    Raises InputError for names that are no such keys or stand above one another, and for a dtype
    that the format does not know.
    """
    return OrbaxFolder(path, infos, metadata)


def _tree(infos: Sequence[TensorLike]) -> Iterator[tuple[tuple[str, ...], TensorLike]]:
    """Yield the keys of each tensor, checked."""
    names = {info.name for info in infos}
    for info in infos:
        keys = tuple(info.name.split("."))
        above = {".".join(keys[:depth]) for depth in range(1, len(keys))}
        if not all(map(plain_name, keys)) or above & names:
            raise InputError(
                f"expected a name of keys joined with '.', none of them the name of another tensor "
                f"or part of a path: found {info.name!r}."
            )
        if info.dtype not in DTYPES.values():
            raise InputError(
                f"{info.name}: expected one of the dtypes {', '.join(map(str, DTYPES.values()))}, "
                f"found {info.dtype}. Convert the array first."
            )
        yield keys, info


def _entry(keys: tuple[str, ...], info: TensorLike) -> dict[str, Any]:
    return {
        "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
        "value_metadata": {
            "value_type": "np.ndarray",
            "skip_deserialize": False,
            "write_shape": list(info.shape),
        },
    }


def _chunks(info: TensorLike) -> tuple[int, ...]:
    """Return the shape of a chunk: whole rows of about BLOCK bytes, all of the other dimensions."""
    if not info.shape:
        return ()
    rest = tuple(max(length, 1) for length in info.shape[1:])
    rows = max(1, BLOCK // (math.prod(rest) * info.dtype.itemsize))
    return (min(rows, max(info.shape[0], 1)), *rest)
