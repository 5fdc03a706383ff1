# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as a whole: directories, shards, indices."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import BINS, OTHERS, WEIGHTS, equal, read, write
from safetensors.numpy import save_file

from opt_core.checkpoints import CheckpointIndex, CheckpointReader
from opt_core.errors import CheckpointError, FormatError

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
        assert reader.container == "torch"
        assert reader.files == (tmp_path / "pytorch_model.bin",)


def test_torch_shards(tmp_path: Path) -> None:
    with CheckpointReader.open(BINS / "module_zip.bin") as reader:
        names = list(reader)
    shutil.copy(BINS / "module_zip.bin", tmp_path / "pytorch_model-00001-of-00001.bin")
    index(tmp_path, dict.fromkeys(names, "pytorch_model-00001-of-00001.bin"), "pytorch_model.bin")
    with CheckpointReader.open(tmp_path) as reader:
        assert reader.container == "torch"
        assert list(reader) == names


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert equal(read(tmp_path), WEIGHTS)
    shutil.copy(BINS / "views_legacy.bin", tmp_path / "model.safetensors")
    with CheckpointReader.open(tmp_path / "model.safetensors") as reader:
        assert reader.container == "torch"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a file or a directory, found none"):
        CheckpointReader.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, .*; found an empty"):
        CheckpointReader.open(tmp_path)
    (tmp_path / "model.onnx").write_text("")
    with pytest.raises(CheckpointError, match=r"model.safetensors, .*; found model.onnx"):
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
