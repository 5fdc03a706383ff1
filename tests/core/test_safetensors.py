# SPDX-License-Identifier: Apache-2.0
"""The safetensors container against the safetensors library, and against files that lie."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save
from strategies import same, state_dicts

from opt_core.checkpoints.reader import CheckpointReader
from opt_core.checkpoints.safetensors_format import DTYPES, write_header
from opt_core.checkpoints.tensors import TensorInfo
from opt_core.errors import FormatError, InputError

VALUES = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


def read(data: bytes) -> dict[str, NDArray[Any]]:
    """Read a file of these bytes, every tensor."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(data)
        with CheckpointReader.open(path) as reader:
            assert reader.container == "safetensors"
            return {name: tensor.read() for name, tensor in reader.items()}


def build(header: Any, values: bytes = b"", length: int | None = None) -> bytes:
    """Make a file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@given(state_dicts)
def test_reads_what_the_library_writes(tensors: dict[str, NDArray[Any]]) -> None:
    known = {
        name: np.ascontiguousarray(array).reshape(array.shape)
        for name, array in tensors.items()
        if array.dtype.kind != "V" and "float8" not in str(array.dtype)
    }
    found = read(save(known))
    assert found.keys() == known.keys()
    assert all(same(found[name], known[name]) for name in known)


def test_the_values_begin_at_a_multiple_of_64() -> None:
    for length in range(70):
        info = TensorInfo("n" * length, np.dtype(np.float32), (2,), Path("f"))
        assert len(write_header([info], {"format": "pt"})) % 64 == 0


def test_metadata_and_the_padding_of_other_writers() -> None:
    header = {"__metadata__": {"format": "tf"}, "a": entry(), "zero": entry("I64", [0, 3], [8, 8])}
    found = read(build(json.dumps(header).encode() + b"     ", bytes(8)))
    assert same(found["a"], np.zeros(2, np.float32))
    assert found["zero"].shape == (0, 3)


LIES = {
    "nothing": (b"", "found 0 bytes"),
    "short": (b"\x01\0\0", "found 3 bytes"),
    "header beyond the file": (build({"a": entry()}, length=5000), "header of 5000 bytes, found"),
    "header of 9 GB": (build({}, length=9 * 10**9), "at most 100000000 bytes, found a length of 9"),
    "broken JSON": (build(b'{"a": '), "expected a JSON object"),
    "broken UTF-8": (build(b'{"\xff": 1}'), "expected a JSON object"),
    "half a surrogate": (build(b'{"\\ud800": 1}'), "expected a JSON object"),
    "NaN": (build(b'{"a": NaN}'), "NaN is not JSON"),
    "endless nesting": (build(b'{"a":' + b"[" * 200_000), "expected a JSON object"),
    "a name twice": (build(b'{"a": 1, "a": 2}'), "'a' stands there twice"),
    "metadata of numbers": (build({"__metadata__": {"a": 1}}), "__metadata__ to map"),
    "no dtype": (build({"a": {"shape": [1]}}), "tensor 'a': expected dtype, shape"),
    "unknown dtype": (build({"a": entry("F4")}, bytes(8)), "expected a dtype of F64.*found 'F4'"),
    "dtype of another kind": (build({"a": entry(["F32"])}, bytes(8)), "expected a dtype of"),
    "shape of another kind": (build({"a": entry(shape=2)}, bytes(8)), "expected a list as shape"),
    "negative shape": (build({"a": entry(shape=[-2])}, bytes(8)), "tensor 'a': expected a shape"),
    "float in shape": (build({"a": entry(shape=[2.0])}, bytes(8)), "tensor 'a': expected a shape"),
    "huge shape": (build({"a": entry(shape=[2**62, 4])}, bytes(8)), "expected a shape"),
    "one offset": (build({"a": entry(offsets=[0])}, bytes(8)), r"expected data_offsets \[begin"),
    "backward": (build({"a": entry(offsets=[8, 0])}, bytes(8)), "expected data_offsets"),
    "negative offset": (build({"a": entry(offsets=[-8, 0])}, bytes(8)), "expected data_offsets"),
    "other size": (build({"a": entry(shape=[3])}, bytes(8)), "expected 12 bytes for F32"),
    "hole": (build({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "'b'.*a hole"),
    "hole at the start": (build({"a": entry(offsets=[4, 12])}, bytes(12)), "'a'.*a hole"),
    "overlap": (build({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "'b'.*an overlap"),
    "truncated": (save(VALUES)[:-1], "expected 1[0-9]+ bytes by its header"),
    "trailing": (save(VALUES) + b"x", "expected 1[0-9]+ bytes by its header"),
    "not safetensors": (b"<!DOCTYPE html><html>", "begin with b'<!DOCTYPE html>"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), LIES.values(), ids=LIES)
def test_a_file_that_lies_is_refused_by_name(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=f"(?s)model.safetensors.*{message}"):
        read(data)


@given(st.binary(max_size=40), st.integers(0, 200))
def test_any_bytes_are_read_or_refused(junk: bytes, position: int) -> None:
    data = bytearray(save(VALUES, {"format": "pt"}))
    data[position : position + len(junk)] = junk
    try:
        read(bytes(data))
    except FormatError:
        return
    safetensors.deserialize(bytes(data))  # what we take, the library takes


@given(st.integers(0, 8 * len(save(VALUES)) - 1))
def test_a_flipped_bit_is_refused_or_only_a_value_or_a_word(bit: int) -> None:
    data = bytearray(save(VALUES))
    data[bit // 8] ^= 1 << bit % 8
    try:
        found = read(bytes(data))
    except FormatError:
        return
    assert len(found) == len(VALUES)
    assert sum(array.nbytes for array in found.values()) == 32
    expected = {name: bytes(spec["data"]) for name, spec in safetensors.deserialize(bytes(data))}
    assert {name: array.tobytes() for name, array in found.items()} == expected


@pytest.mark.parametrize(
    ("infos", "metadata", "message"),
    [
        ([("a", "f4"), ("a", "f4")], {}, "names that differ"),
        ([("__metadata__", "f4")], {}, "names that differ"),
        ([("a", ">f4")], {}, "a: expected one of the dtypes"),
        ([("a", "c16")], {}, "a: expected one of the dtypes"),
        ([], {"a": 1}, "expected strings"),
    ],
)
def test_a_header_that_cannot_be_written(
    infos: list[tuple[str, str]], metadata: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_header([TensorInfo(n, np.dtype(d), (1,), Path("f")) for n, d in infos], metadata)


def test_every_dtype_has_its_own_code() -> None:
    assert len(set(DTYPES.values())) == len(DTYPES) == 16
