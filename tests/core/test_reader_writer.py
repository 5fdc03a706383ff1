# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as a whole: directories, shards, indices; there and back; all or nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import deserialize, safe_open
from safetensors.numpy import load_file, save_file
from strategies import arrays, same, state_dicts

import opt_core.checkpoints.writer as writer_module
from opt_core.checkpoints import CheckpointIndex, CheckpointReader, CheckpointWriter, LazyTensor
from opt_core.checkpoints.writer import parse_size
from opt_core.errors import CheckpointError, FormatError, InputError
from opt_core.files import atomic_write

BINS = Path(__file__).parents[1] / "golden" / "torch_bins"
WEIGHTS = {f"layer.{n}": np.full((2, 3), n, np.float32) for n in range(5)}
OTHERS = {f"other.{n}": np.full((4,), n, np.float16) for n in range(3)}


def write(
    directory: Path, tensors: dict[str, NDArray[Any]], size: int | str = "5GB", **options: Any
) -> None:
    infos = [LazyTensor.from_array(name, array) for name, array in tensors.items()]
    with CheckpointWriter(directory, infos, max_shard_size=size, **options) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def read(path: Path) -> dict[str, NDArray[Any]]:
    with CheckpointReader.open(path) as reader:
        return {name: tensor.read() for name, tensor in reader.items()}


def equal(left: dict[str, NDArray[Any]], right: dict[str, NDArray[Any]]) -> bool:
    return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)


def listing(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


# --- there and back -----------------------------------------------------------------------------


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
        assert reader.format == "safetensors"
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


def test_own_metadata_and_none(tmp_path: Path) -> None:
    write(tmp_path, WEIGHTS, metadata={"made by": "a test"})
    with CheckpointReader.open(tmp_path) as reader:
        assert reader.metadata == {"made by": "a test"}
    write(tmp_path, WEIGHTS, metadata={})
    assert equal(load_file(tmp_path / "model.safetensors"), WEIGHTS)


def test_a_large_array_in_another_order_is_written_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_BLOCK", 100)
    array = np.arange(600, dtype=np.float32).reshape(20, 30).T
    write(tmp_path, {"a": array})
    assert same(read(tmp_path)["a"], array)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("5GB", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("1.5 MB", 1_500_000),
        ("2KiB", 2048),
        ("9B", 9),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "size", [0, -1, "0GB", "5", "5gb", "GB", "-1GB", "5iB", "1e3MB", True, 1.5, None]
)
def test_sizes_that_are_none(tmp_path: Path, size: Any) -> None:
    with pytest.raises(InputError, match="max_shard_size: expected bytes"):
        CheckpointWriter(tmp_path, [], max_shard_size=size)


# --- all of a save or nothing ---------------------------------------------------------------------


@pytest.mark.parametrize("old", [20, 50, 10**9])
@pytest.mark.parametrize("new", [8, 16, 10**9])
def test_an_earlier_save_gives_way(tmp_path: Path, old: int, new: int) -> None:
    write(tmp_path, WEIGHTS, old)
    for name in (
        "config.json",
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "my-model.safetensors",
    ):
        (tmp_path / name).write_text("stays")
    write(tmp_path, OTHERS, new)
    assert equal(read(tmp_path), OTHERS)
    ours = [name for name in listing(tmp_path) if re.match(r"\.|model[-.](?!fp16)", name)]
    assert len(ours) == {8: 4, 16: 3, 10**9: 1}[new]
    assert len(listing(tmp_path)) == len(ours) + 4


class BrokenError(Exception):
    """What goes wrong in the tests below."""


def spoil(directory: Path, how: str, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Save, and fail at a tensor or, when all are written, at one of the renames."""
    renames = iter(range(100))
    rename = os.rename

    def break_late(source: Path, target: Path) -> None:
        if next(renames) == int(how.removeprefix("rename ")):
            raise BrokenError
        rename(source, target)

    infos = [LazyTensor.from_array(name, array) for name, array in OTHERS.items()]
    with monkeypatch.context() as patch, CheckpointWriter(
        directory, infos, max_shard_size=size
    ) as writer:  # fmt: skip
        for name, array in OTHERS.items():
            if how == name:
                raise BrokenError
            writer.write(name, array)
        if how.startswith("rename"):
            patch.setattr(os, "rename", break_late)


@pytest.mark.parametrize("how", ["other.0", "other.2", *(f"rename {n}" for n in range(4))])
@pytest.mark.parametrize("size", [8, 10**9])
@pytest.mark.parametrize("old", [20, 50, 10**9])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, size: int, old: int
) -> None:
    write(tmp_path, WEIGHTS, old)
    before = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}
    if how.startswith("rename"):
        count = len(before) + (4 if size == 8 else 1)
        how = f"rename {int(how[-1]) * (count - 1) // 3}"  # from the first to the last
    with pytest.raises(BrokenError):
        spoil(tmp_path, how, monkeypatch, size)
    assert {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)} == before


def test_a_failure_leaves_no_directory_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BrokenError):
        spoil(tmp_path / "a" / "b", "other.1", monkeypatch, 8)
    assert listing(tmp_path) == []


def test_not_all_written(tmp_path: Path) -> None:
    infos = [LazyTensor.from_array(name, array) for name, array in WEIGHTS.items()]
    with (
        pytest.raises(CheckpointError, match=r"expected 5 tensors, found 1: layer.1 and"),
        CheckpointWriter(tmp_path / "new", infos) as writer,
    ):
        writer.write("layer.0", WEIGHTS["layer.0"])
    assert listing(tmp_path) == []


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
    infos = [LazyTensor.from_array("layer.0", WEIGHTS["layer.0"])]
    with (
        pytest.raises(InputError, match=r"expected layer.0 float32 \(2, 3\) next, found"),
        CheckpointWriter(tmp_path, infos) as writer,
    ):
        writer.write(name, array)


def test_one_too_many_and_out_of_the_block(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, [])
    with pytest.raises(InputError, match="a: expected no tensor now"):
        writer.write("a", np.zeros(1))
    with pytest.raises(InputError, match="a: expected no tensor now"), writer:
        writer.write("a", np.zeros(1))


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a directory to save into, found a file"):
        CheckpointWriter(tmp_path / "file", [])


def test_a_model_can_be_saved_over_the_files_it_is_mapped_from(tmp_path: Path) -> None:
    write(tmp_path, WEIGHTS)
    with CheckpointReader.open(tmp_path) as reader:
        mapped = {name: tensor.map() for name, tensor in reader.items()}
        write(tmp_path, {name: array + 1 for name, array in mapped.items()})
        assert equal(mapped, WEIGHTS)
        assert same(reader["layer.0"].read(), WEIGHTS["layer.0"])
    assert same(read(tmp_path)["layer.4"], WEIGHTS["layer.4"] + 1)


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


# --- directories --------------------------------------------------------------------------------


def test_the_order_in_which_a_directory_is_searched(tmp_path: Path) -> None:
    write(tmp_path, WEIGHTS, 50)
    shutil.copy(BINS / "module_zip.bin", tmp_path / "pytorch_model.bin")
    save_file(OTHERS, tmp_path / "model.safetensors")
    assert equal(read(tmp_path), OTHERS)
    (tmp_path / "model.safetensors").unlink()
    assert equal(read(tmp_path), WEIGHTS)
    (tmp_path / "model.safetensors.index.json").unlink()
    with CheckpointReader.open(tmp_path) as reader:
        assert reader.format == "torch"
        assert reader.files == (tmp_path / "pytorch_model.bin",)


def test_torch_shards(tmp_path: Path) -> None:
    with CheckpointReader.open(BINS / "module_zip.bin") as reader:
        names = list(reader)
    shutil.copy(BINS / "module_zip.bin", tmp_path / "pytorch_model-00001-of-00001.bin")
    index(tmp_path, dict.fromkeys(names, "pytorch_model-00001-of-00001.bin"), "pytorch_model.bin")
    with CheckpointReader.open(tmp_path) as reader:
        assert reader.format == "torch"
        assert list(reader) == names


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert equal(read(tmp_path), WEIGHTS)
    shutil.copy(BINS / "views_legacy.bin", tmp_path / "model.safetensors")
    with CheckpointReader.open(tmp_path / "model.safetensors") as reader:
        assert reader.format == "torch"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a file or a directory, found none"):
        CheckpointReader.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.index.json; found an empty"):
        CheckpointReader.open(tmp_path)
    (tmp_path / "flax_model.msgpack").write_text("")
    with pytest.raises(CheckpointError, match=r"model.safetensors, .*; found flax_model.msgpack"):
        CheckpointReader.open(tmp_path)


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n")
    with pytest.raises(FormatError, match=r"found a Git LFS pointer.*git lfs pull"):
        CheckpointReader.open(path)


def test_a_named_pipe_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="expected a file"):
        CheckpointReader.open(tmp_path / "pipe")


def test_closed(tmp_path: Path) -> None:
    write(tmp_path, WEIGHTS)
    with CheckpointReader.open(tmp_path) as reader:
        pass
    with pytest.raises(CheckpointError, match="the reader was closed"):
        reader["layer.0"].read()


# --- indices ------------------------------------------------------------------------------------


def index(directory: Path, weight_map: Any, stem: str = "model.safetensors", **more: Any) -> None:
    (directory / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map, **more}))


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "1.safetensors")
    save_file({"b": np.ones(2, np.float16)}, tmp_path / "2.safetensors")
    return tmp_path


def test_an_index_is_written_as_it_is_read(two_shards: Path) -> None:
    index(two_shards, {"b": "2.safetensors", "a": "1.safetensors"}, metadata={"total_size": 8})
    found = CheckpointIndex.read(two_shards / "model.safetensors.index.json")
    assert found.total_size == 8
    assert [path.name for path in found.shards] == ["1.safetensors", "2.safetensors"]
    assert json.loads(found.to_json()) == {
        "metadata": {"total_size": 8},
        "weight_map": {"a": "1.safetensors", "b": "2.safetensors"},
    }
    assert read(two_shards).keys() == {"a", "b"}
    assert read(two_shards / "model.safetensors.index.json").keys() == {"a", "b"}


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "sub/1.safetensors",
        "..",
        ".",
        "",
        "a\0b",
        "..\\x",
        "C:x",
        7,
        None,
    ],
)
def test_an_index_names_plain_files_only(two_shards: Path, name: Any) -> None:
    index(two_shards, {"a": "1.safetensors", "evil": name})
    with pytest.raises(
        FormatError, match=r"model.safetensors.index.json: tensor 'evil': expected the plain name"
    ) as caught:
        CheckpointReader.open(two_shards)
    assert repr(str(name)) in str(caught.value)


def test_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(WEIGHTS, blobs / "0123")
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/0123")
    index(snapshot, dict.fromkeys(WEIGHTS, "model-1.safetensors"))
    assert equal(read(snapshot), WEIGHTS)


BAD_INDICES = {
    "a missing file": ({"a": "1.safetensors", "b": "3.safetensors"}, "'b': expected the file 3"),
    "a tensor in another file": (
        {"a": "2.safetensors", "b": "1.safetensors"},
        "'a': expected in 2",
    ),
    "a tensor nowhere": (
        {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"},
        "'c': expected in 2.safetensors, found it nowhere",
    ),
    "a list": (["1.safetensors"], "expected 'weight_map' to map"),
    "nothing": ({}, "expected 'weight_map' to map"),
}


@pytest.mark.parametrize(("weight_map", "message"), BAD_INDICES.values(), ids=BAD_INDICES)
def test_an_index_that_lies(two_shards: Path, weight_map: Any, message: str) -> None:
    index(two_shards, weight_map)
    with pytest.raises(FormatError, match=f"model.safetensors.index.json: .*{message}"):
        CheckpointReader.open(two_shards)


def test_a_tensor_that_the_index_leaves_out(two_shards: Path) -> None:
    save_file({"b": np.ones(2), "c": np.ones(2)}, two_shards / "2.safetensors")
    index(two_shards, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(FormatError, match=r"found 'c' of 2.safetensors missing"):
        CheckpointReader.open(two_shards)


def test_a_tensor_in_two_shards(two_shards: Path) -> None:
    save_file({"a": np.ones(2), "b": np.ones(2)}, two_shards / "2.safetensors")
    index(two_shards, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(FormatError, match=r"'a': expected it in one file, found it in 1.safe"):
        CheckpointReader.open(two_shards)


def test_shards_of_two_formats(two_shards: Path) -> None:
    shutil.copy(BINS / "views_zip.bin", two_shards / "2.safetensors")
    with CheckpointReader.open(two_shards / "2.safetensors") as reader:
        names: Iterable[str] = list(reader)
    index(two_shards, {"a": "1.safetensors", **dict.fromkeys(names, "2.safetensors")})
    with pytest.raises(FormatError, match="expected one format, found safetensors in 1"):
        CheckpointReader.open(two_shards)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {"a": "b", "a": "c"}}', "\udcff"])
def test_an_index_that_is_no_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FormatError, match=r"index.json: expected a JSON object"):
        CheckpointReader.open(path)
