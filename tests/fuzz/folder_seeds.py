# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are folders of many files: orbax as tensorstore writes it, and metaseq."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from opt_core.checkpoints.orbax_writer import create_orbax
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.config import OPTConfig
from tests.core import metaseq_files as metaseq

Files = Mapping[str, bytes]

ORBAX = Path(__file__).with_name("orbax.zip")


def read_folder(folder: Path) -> dict[str, bytes]:
    """The content of each file in a folder, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _made(write: Callable[[Path], Any]) -> Files:
    with TemporaryDirectory() as folder:
        write(Path(folder))
        return read_folder(Path(folder))


# --- metaseq ------------------------------------------------------------------------------------


def metaseq_folders(config: OPTConfig) -> Iterator[tuple[str, Files]]:
    """Every form in which metaseq has written checkpoints, by name."""
    state = metaseq.random_state(config)
    settings = {"decoder_attention_heads": config.num_attention_heads, "activation_fn": "relu"}
    yield "single", _made(lambda at: metaseq.write_single(at, state))
    yield "bare", _made(lambda at: metaseq.write_single(at, state, fused=False, bare=True))
    yield "parts", _made(lambda at: metaseq.write_parts(at, state, 2))
    yield "flat", _made(lambda at: metaseq.write_flat_parts(at, state, 2))
    yield "implied", _made(lambda at: metaseq.write_flat_parts(at, state, 2, metadata=False))
    yield "shards", _made(lambda at: metaseq.write_shards(at, state, 2, settings=settings))
    yield "grid", _made(lambda at: metaseq.write_shards(at, state, 2, parts=2))


# --- orbax --------------------------------------------------------------------------------------


def orbax_folders(arrays: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, Files]]:
    """Our own, and those that make_orbax.py had tensorstore write."""
    yield "own", _made(lambda at: _write_own(at, arrays))
    folders: dict[str, dict[str, bytes]] = {}
    with zipfile.ZipFile(ORBAX) as archive:
        for path in archive.namelist():
            kind, _, name = path.partition("/")
            folders.setdefault(kind, {})[name] = archive.read(path)
    yield from folders.items()


def _write_own(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    tensors = [LazyTensor.from_array(name, array) for name, array in arrays.items()]
    file = create_orbax(folder / "orbax", tensors, {"format": "flax"})
    for tensor in tensors:
        file.write(tensor.name, tensor.blocks())
    file.finish()
    file.close()
