# SPDX-License-Identifier: Apache-2.0
"""LazyTensor: three ways to the same values, and how much memory each takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import arrays, same

from opt_core.checkpoints.sources import FileSource
from opt_core.checkpoints.tensors import LazyTensor, TensorInfo
from opt_core.errors import CheckpointError, FormatError, InputError

ROOT = Path(__file__).parents[2]


def lazy(path: Path, shape: tuple[int, ...], *strides: int, offset: int = 0) -> LazyTensor:
    info = TensorInfo("t", np.dtype(np.float32), shape, path)
    return LazyTensor(info, FileSource(path), offset, strides or None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "values"
    np.arange(24, dtype=np.float32).tofile(path)
    return path


@given(arrays())
def test_an_array_in_memory_is_a_lazy_tensor_too(array: NDArray[Any]) -> None:
    tensor = LazyTensor.from_array("t", array)
    assert (tensor.name, tensor.dtype, tensor.shape) == ("t", array.dtype, array.shape)
    assert tensor.info.nbytes == array.nbytes
    assert tensor.info.size == array.size
    assert same(tensor.map(), array)
    assert same(tensor.read(), array)
    if array.flags.c_contiguous and array.size:
        assert np.shares_memory(tensor.map(), array)
    assert not np.shares_memory(tensor.read(), array)


@given(arrays(), st.data())
def test_a_slice_is_what_numpy_makes_of_it(array: NDArray[Any], data: st.DataObject) -> None:
    if array.ndim:
        dim = data.draw(st.integers(0, array.ndim - 1))
        start = data.draw(st.integers(0, array.shape[dim]))
        stop = data.draw(st.integers(start, array.shape[dim]))
        found = LazyTensor.from_array("t", array).read_slice(dim, start, stop)
        assert same(found, array.take(range(start, stop), dim))
        assert found.flags.c_contiguous


@pytest.mark.parametrize(("dim", "start", "stop"), [(2, 0, 1), (-1, 0, 1), (0, 1, 5), (0, 2, 1)])
def test_a_slice_outside_is_refused(file: Path, dim: int, start: int, stop: int) -> None:
    with pytest.raises(InputError, match=r"expected a slice within shape \(4, 6\)"):
        lazy(file, (4, 6)).read_slice(dim, start, stop)


def test_read_is_private_contiguous_and_aligned(file: Path) -> None:
    tensor = lazy(file, (4, 5), offset=4)
    array = tensor.read()
    assert array.ctypes.data % 64 == 0
    assert array.flags.c_contiguous
    assert array.flags.writeable
    array[...] = 0
    assert tensor.read()[0, 0] == 1


def test_a_mapped_array_can_be_written_and_the_file_stays(file: Path) -> None:
    before = file.read_bytes()
    tensor = lazy(file, (4, 6))
    array = tensor.map()
    array[...] = -1
    assert file.read_bytes() == before
    assert tensor.read()[3, 5] == 23
    assert np.shares_memory(array, tensor.map())


def test_strides_as_torch_has_them(file: Path) -> None:
    expected = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensor = lazy(file, (6, 4), 1, 6)
    assert same(tensor.read(), expected.T)
    assert same(tensor.map(), expected.T)
    assert tensor.read().flags.c_contiguous
    assert same(tensor.read_slice(1, 1, 3), expected.T[:, 1:3])


def test_a_closed_source_says_so_and_its_arrays_live_on(file: Path) -> None:
    source = FileSource(file)
    tensor = LazyTensor(TensorInfo("t", np.dtype(np.float32), (24,), file), source)
    array = tensor.map()
    source.close()
    source.close()
    assert array[23] == 23
    for use in (tensor.map, tensor.read):
        with pytest.raises(CheckpointError, match="the reader was closed"):
            use()


def test_a_file_cut_short_after_opening(file: Path) -> None:
    tensor = lazy(file, (24,))
    with open(file, "r+b") as handle:
        handle.truncate(50)
    with pytest.raises(FormatError, match=r"values: expected 96 bytes at 0, found 50.*cut short"):
        tensor.read()


def test_a_tensor_outside_its_file(file: Path) -> None:
    with pytest.raises(FormatError, match="within the file, found a file of 96 bytes"):
        lazy(file, (25,))


@pytest.mark.parametrize("shape", [(-1,), (2.0,), (True,), (1,) * 40, (0, 2**62), (2**70,)])
def test_a_shape_that_no_array_has(shape: tuple[Any, ...]) -> None:
    with pytest.raises(FormatError, match=r"f: tensor 't': expected a shape"):
        TensorInfo("t", np.dtype(np.float32), shape, Path("f"))


# A new process, and VmHWM: ru_maxrss would begin with the peak of the process that started it.
MEASURE = """
import json, re, sys
from pathlib import Path
from opt_core.checkpoints import CheckpointReader
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
reader = CheckpointReader.open(sys.argv[1])
reader["small"].read()
before = peak()
mapped = reader["big"].map()
opened = peak() - before
array = reader["one"].read() if sys.argv[2] == "read" else reader["one"].read_slice(1, 0, 512)
print(json.dumps([opened, peak() - before, array.nbytes]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is a figure of Linux")
@pytest.mark.parametrize("how", ["read", "slice"])
def test_one_tensor_of_a_large_file_takes_its_own_memory(tmp_path: Path, how: str) -> None:
    from safetensors.numpy import save_file

    tensors = {
        "big": np.ones((64, 2**20), np.float32),
        "one": np.ones((8192, 1024), np.float32),
        "small": np.ones(1, np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), how],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    opened, peak, nbytes = json.loads(done.stdout)
    assert opened < 2**20, "mapping 256 MB touches no page"
    assert nbytes <= peak + 2**20
    assert peak < nbytes + 2**20
