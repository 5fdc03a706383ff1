# SPDX-License-Identifier: Apache-2.0
"""Tensors streamed into files: any shards, there and back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from checkpoint_files import WEIGHTS, equal, listing, read, write
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import deserialize, safe_open
from strategies import arrays, same, state_dicts

from opt_core.checkpoints import CheckpointReader, CheckpointWriter, LazyTensor
from opt_core.checkpoints.writer import parse_size
from opt_core.errors import CheckpointError, InputError
from opt_core.files import atomic_write


@given(state_dicts, st.integers(1, 300))
def test_there_and_back_in_any_shards(tensors: dict[str, NDArray[Any]], size: int) -> None:
    with TemporaryDirectory() as folder:
        directory = Path(folder) / "made" / "for it"
        write(directory, tensors, size)
        assert equal(read(directory), tensors)
        shards = [deserialize(file.read_bytes()) for file in directory.glob("*.safetensors")]
        by_library = {name: bytes(spec["data"]) for shard in shards for name, spec in shard}
        assert by_library == {name: array.tobytes() for name, array in tensors.items()}
        for shard in shards:
            assert len(shard) <= 1 or sum(len(spec["data"]) for _, spec in shard) <= size
        if len(shards) > 1:
            total = json.loads((directory / "model.safetensors.index.json").read_text())
            assert total["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())


@given(st.lists(arrays(), max_size=6))
def test_every_tensor_is_aligned_to_its_elements(values: list[NDArray[Any]]) -> None:
    """torch's view of a storage refuses other offsets; the format leaves no room for padding."""
    with TemporaryDirectory() as folder:
        write(Path(folder), {str(n): array for n, array in enumerate(values)})
        with CheckpointReader.open(folder) as reader:
            assert all(tensor.map().flags.aligned for tensor in reader.values())


def test_the_names_of_shards(tmp_path: Path) -> None:
    write(tmp_path, WEIGHTS, 50)
    assert listing(tmp_path) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    with CheckpointReader.open(tmp_path) as reader:
        assert reader.container == "safetensors"
        assert reader.metadata == {"format": "pt"}
        assert [file.name for file in reader.files] == listing(tmp_path)[:3]
        assert list(reader) == list(WEIGHTS)
        assert len(reader) == 5
        assert "layer.9" not in reader
    with safe_open(tmp_path / "model-00001-of-00003.safetensors", "np") as shard:
        assert shard.metadata() == {"format": "pt"}
        assert sorted(shard.keys()) == [
            "layer.0",
            "layer.1",
        ]


def test_a_tensor_beyond_the_limit_gets_a_shard_of_its_own(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(2, np.uint8), "b": np.zeros(90, np.uint8), "c": np.zeros(2, np.uint8)}
    write(tmp_path, tensors, 10)
    with CheckpointReader.open(tmp_path) as reader:
        assert [t.info.file.name[6:11] for t in reader.values()] == ["00001", "00002", "00003"]


def infos(tensors: dict[str, NDArray[Any]]) -> list[LazyTensor]:
    return [LazyTensor.from_array(name, array) for name, array in tensors.items()]


@given(arrays().filter(lambda array: array.ndim > 0), st.integers(1, 9))
def test_a_tensor_may_come_in_blocks(array: NDArray[Any], rows: int) -> None:
    with TemporaryDirectory() as name:
        with CheckpointWriter(Path(name), infos({"a": array})) as writer:
            writer.write("a", (array[i : i + rows] for i in range(0, len(array), rows)))
        assert same(read(Path(name))["a"], array)


def test_complete_files_are_kept_if_asked(tmp_path: Path) -> None:
    write(tmp_path, WEIGHTS, 50)
    with CheckpointWriter(
        tmp_path, infos(WEIGHTS), max_shard_size=50, keep_complete=True
    ) as writer:
        assert writer.missing == frozenset()
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with CheckpointWriter(
        tmp_path, infos(WEIGHTS), max_shard_size=50, keep_complete=True
    ) as writer:
        assert writer.missing == {"layer.2", "layer.3"}
        for key in sorted(writer.missing):
            writer.write(key, WEIGHTS[key])
    assert equal(read(tmp_path), WEIGHTS)


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, infos(WEIGHTS), max_shard_size=50) as writer:
        for number, (key, array) in enumerate(WEIGHTS.items(), start=1):
            writer.write(key, array)
            assert (
                len(list(tmp_path.glob("*.safetensors")))
                == -(-number // 2) - number % 2 + number // 5
            )
    assert listing(tmp_path)[-1] == "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("5GB", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("1.5 MB", 1_500_000),
        ("2KiB", 2048),
        ("9B", 9),
        ("5000", 5000),
        ("10kB", 10_000),
        ("5gb", 5 * 10**9),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "size", [0, -1, "0GB", "", "GB", "-1GB", "5iB", "1e3MB", "9" * 400 + "GB", True, 1.5, None]
)
def test_sizes_that_are_none(tmp_path: Path, size: Any) -> None:
    with pytest.raises(InputError, match="max_shard_size: expected a number of bytes"):
        CheckpointWriter(tmp_path, [], max_shard_size=size)


def test_not_all_written(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"expected 5 tensors, found 1: layer.1 and"),
        CheckpointWriter(tmp_path, infos(WEIGHTS)) as writer,
    ):
        writer.write("layer.0", WEIGHTS["layer.0"])
    assert listing(tmp_path) == ["model.safetensors.part"]


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("layer.1", WEIGHTS["layer.0"]),
        ("layer.0", WEIGHTS["layer.0"].astype(np.float16)),
        ("layer.0", WEIGHTS["layer.0"].T),
        ("layer.0", WEIGHTS["layer.0"].astype(">f4")),
    ],
    ids=["name", "dtype", "shape", "byte order"],
)
def test_what_was_not_announced(tmp_path: Path, name: str, array: NDArray[Any]) -> None:
    with (
        pytest.raises(
            InputError,
            match=r"expected (layer.0 next|(float32|the announced shape) \(2, 3\)), found",
        ),
        CheckpointWriter(tmp_path, infos({"layer.0": WEIGHTS["layer.0"]})) as writer,
    ):
        writer.write(name, array)


def test_one_too_many_and_out_of_the_block(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, [])
    with pytest.raises(InputError, match="a: expected no tensor now"):
        writer.write("a", np.zeros(1))
    with pytest.raises(InputError, match="a: expected no tensor now"), writer:
        writer.write("a", np.zeros(1))


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    atomic_write(path, "é")
    assert path.read_bytes() == "é".encode()
    atomic_write(str(path), b"two")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "\ud800")
    assert path.read_bytes() == b"two"
    assert listing(tmp_path) == ["config.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
