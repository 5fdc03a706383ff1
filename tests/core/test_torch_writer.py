# SPDX-License-Identifier: Apache-2.0
"""`pytorch_model.bin` written without torch: read back by our reader, and held to its standards.

That torch itself reads it is shown in tests/torch/test_torch_files.py.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import arrays, names, same
from written import TORCH_DTYPES, some, write_file

from opt_core.checkpoints import zip_writer
from opt_core.checkpoints.output import CreateFile
from opt_core.checkpoints.sources import FileSource
from opt_core.checkpoints.tensors import LazyTensor, TensorInfo
from opt_core.checkpoints.torch_format import matches, read_torch
from opt_core.checkpoints.torch_writer import create_torch_legacy, create_torch_zip
from opt_core.errors import InputError

BINS = Path(__file__).parents[1] / "golden" / "torch_bins"
CREATE: dict[str, CreateFile] = {"zip": create_torch_zip, "legacy": create_torch_legacy}
state_dicts = st.dictionaries(
    names, arrays().filter(lambda array: array.dtype in TORCH_DTYPES), max_size=6, min_size=1
)
kinds = pytest.mark.parametrize("create", CREATE.values(), ids=CREATE)


def read(path: Path) -> dict[str, NDArray[Any]]:
    source = FileSource(path)
    assert matches(source.read_bytes(0, 512))
    tensors, metadata = read_torch(source)
    assert metadata == {}
    return {tensor.name: tensor.read() for tensor in tensors}


def assert_equal(found: dict[str, NDArray[Any]], wanted: dict[str, NDArray[Any]]) -> None:
    assert list(found) == list(wanted)
    assert all(same(found[name], wanted[name]) for name in wanted)


@kinds
def test_every_dtype_is_read_back(create: CreateFile, tmp_path: Path) -> None:
    wanted = some(*TORCH_DTYPES)
    assert_equal(read(write_file(create, tmp_path / "file", wanted)), wanted)


@given(st.sampled_from(list(CREATE.values())), state_dicts, st.integers(1, 100))
def test_any_state_dict_is_read_back(
    create: CreateFile, wanted: dict[str, NDArray[Any]], block: int
) -> None:
    with TemporaryDirectory() as folder:
        assert_equal(read(write_file(create, Path(folder) / "file", wanted, block)), wanted)


@pytest.mark.parametrize("limit", [zip_writer.ZIP64, 300, 0], ids=["first", "mixed", "zip64"])
def test_zip_and_its_extension_for_large_files(limit: int, tmp_path: Path) -> None:
    """From 4 GiB on, sizes and positions stand in another place; a lower limit shows where."""
    wanted = some(*TORCH_DTYPES)
    with patch.object(zip_writer, "ZIP64", limit):
        path = write_file(create_torch_zip, tmp_path / "file", wanted)
    assert_equal(read(path), wanted)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # every checksum
        assert archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/version") == b"3\n"
        for key, array in enumerate(wanted.values()):
            assert archive.read(f"archive/data/{key}") == array.tobytes()
        assert {entry.extract_version for entry in archive.infolist()} <= {20, 45}
        large = [entry for entry in archive.infolist() if entry.extract_version == 45]
        assert len(large) == sum(entry.file_size >= limit for entry in archive.infolist())


def test_a_member_beyond_4_gib_is_where_the_directory_says(tmp_path: Path) -> None:
    """The values are never written: the file has a hole in their place."""
    huge = TensorInfo("huge", np.dtype(np.float16), (2**31, 2), tmp_path)
    after = LazyTensor.from_array("after", np.arange(5, dtype=np.float32))
    file = create_torch_zip(tmp_path / "file", [huge, after], {})
    file.write("after", after.blocks())
    file.finish()
    tensors = {tensor.name: tensor for tensor in read_torch(FileSource(tmp_path / "file"))[0]}
    assert tensors["huge"].shape == (2**31, 2)
    assert same(tensors["huge"].read_slice(0, 2**31 - 1, 2**31), np.zeros((1, 2), np.float16))
    assert same(tensors["after"].read(), after.read())
    with zipfile.ZipFile(tmp_path / "file") as archive:
        assert archive.getinfo("archive/data/0").file_size == 2**33
        assert archive.getinfo("archive/data/1").header_offset > 2**33
        assert archive.read("archive/data/1") == after.read().tobytes()


def test_each_storage_begins_at_a_multiple_of_64(tmp_path: Path) -> None:
    path = write_file(create_torch_zip, tmp_path / "file", some(*TORCH_DTYPES))
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            header = content[entry.header_offset :][:30]
            lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(
                header[28:], "little"
            )
            assert (entry.header_offset + 30 + lengths) % 64 == 0


def opcodes(data: bytes) -> set[str]:
    """What a pickle does, checked by the standard library to leave one value."""
    pickletools.dis(data, out=io.StringIO())
    return {opcode.name for opcode, _, _ in pickletools.genops(data)}


def test_the_pickles_use_what_those_of_torch_use(tmp_path: Path) -> None:
    zipped = write_file(create_torch_zip, tmp_path / "zip", some(*TORCH_DTYPES))
    with zipfile.ZipFile(zipped) as archive:
        ours = opcodes(archive.read("archive/data.pkl"))
    with zipfile.ZipFile(BINS / "module_zip.bin") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        theirs = opcodes(archive.read(name))
    assert ours <= theirs | {"BININT2"}
    stream = io.BytesIO(write_file(create_torch_legacy, tmp_path / "old", some()).read_bytes())
    for _ in range(5):
        assert [opcode.name for opcode, _, _ in pickletools.genops(stream)][-1] == "STOP"
    assert not stream.read()


@kinds
def test_the_same_tensors_make_the_same_file(create: CreateFile, tmp_path: Path) -> None:
    arrays = some(*TORCH_DTYPES)
    first = write_file(create, tmp_path / "a", arrays, 1).read_bytes()
    assert first == write_file(create, tmp_path / "b", arrays, 10**6).read_bytes()


@kinds
def test_large_numbers(create: CreateFile, tmp_path: Path) -> None:
    """Lengths of one, two, four and more bytes; only the description is written."""
    lengths = (255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**40)
    infos = [TensorInfo(str(n), np.dtype(np.int8), (n, 0), tmp_path) for n in lengths]
    file = create(tmp_path / "file", infos, {})
    file.finish()
    tensors = read_torch(FileSource(tmp_path / "file"))[0]
    assert [tensor.shape[0] for tensor in tensors] == list(lengths)


@kinds
def test_what_torch_has_no_name_for_is_refused(create: CreateFile, tmp_path: Path) -> None:
    tensor = LazyTensor.from_array("a", np.zeros(3, np.complex64))
    with pytest.raises(InputError, match="a: expected one of the dtypes float64, .*complex64"):
        create(tmp_path / "file", [tensor], {})
    assert not (tmp_path / "file").exists()


@kinds
def test_what_was_not_announced_is_refused(create: CreateFile, tmp_path: Path) -> None:
    tensor = LazyTensor.from_array("a", np.zeros(3, np.float32))
    file = create(tmp_path / "file", [tensor], {})
    with pytest.raises(InputError, match="a: expected float32"):
        file.write("a", [np.zeros(4, np.float32)])
    file.close()
