# SPDX-License-Identifier: Apache-2.0
"""`flax_model.msgpack` without flax: what Flax wrote, what msgpack makes of it, and files that lie.

That flax itself reads what we write is shown in tests/flax/test_flax_files.py.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import arrays, same
from written import some, write_file

from opt_core.checkpoints import msgpack_writer
from opt_core.checkpoints.msgpack_format import DTYPES, matches, read_msgpack
from opt_core.checkpoints.msgpack_writer import create_msgpack
from opt_core.checkpoints.safetensors_format import read_safetensors
from opt_core.checkpoints.sources import FileSource
from opt_core.checkpoints.tensors import LazyTensor, TensorInfo
from opt_core.errors import FormatError, InputError

FORMATS = Path(__file__).parents[1] / "golden" / "formats"
ARCHITECTURES = pytest.mark.parametrize("architecture", ["pre_norm", "post_norm"])
CHUNKED = "__msgpack_chunked_array__"


def read(content: bytes | Path) -> dict[str, NDArray[Any]]:
    """Read a file, or one of these bytes, every tensor."""
    if isinstance(content, bytes):
        with TemporaryDirectory() as folder:
            path = Path(folder) / "flax_model.msgpack"
            path.write_bytes(content)
            return read(path)
    source = FileSource(content)
    tensors, metadata = read_msgpack(source)
    assert metadata == {}
    return {tensor.name: tensor.read() for tensor in tensors}


def array(value: NDArray[Any], **fields: Any) -> msgpack.ExtType:
    """Pack an array as Flax does, or with some fields changed."""
    described = {"shape": value.shape, "dtype": value.dtype.name, "values": value.tobytes()}
    return msgpack.ExtType(fields.pop("code", 1), pack(tuple((described | fields).values())))


def pack(tree: Any) -> bytes:
    """Pack nested dictionaries of arrays as Flax does."""
    packed = msgpack.packb(tree, default=array, strict_types=False)
    assert isinstance(packed, bytes)
    return packed


def unpack(content: bytes) -> Any:
    """Unpack with the msgpack library, arrays as described in flax/serialization.py."""

    def extension(code: int, data: bytes) -> NDArray[Any]:
        assert code == 1
        shape, dtype, values = msgpack.unpackb(data)
        return np.frombuffer(values, DTYPES[dtype]).reshape(shape)

    return msgpack.unpackb(content, ext_hook=extension)


def flat(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield names and arrays of nested dictionaries; parts are put together."""
    if isinstance(tree, np.ndarray):
        yield ".".join(path), tree
    elif CHUNKED in tree:
        shape = tuple(tree["shape"].values())
        yield ".".join(path), np.concatenate(list(tree["chunks"].values())).reshape(shape)
    else:
        for key, value in tree.items():
            yield from flat(value, (*path, key))


def assert_equal(found: dict[str, NDArray[Any]], wanted: dict[str, NDArray[Any]]) -> None:
    assert list(found) == list(wanted)
    assert all(same(found[name], wanted[name]) for name in wanted)


# --- what Flax wrote ----------------------------------------------------------------------------


@ARCHITECTURES
@pytest.mark.parametrize("untied", ["", "_untied"])
def test_equal_to_flax_safetensors_and_to_the_library(architecture: str, untied: str) -> None:
    path = FORMATS / architecture / f"msgpack{untied}" / "flax_model.msgpack"
    found = read(path)
    assert_equal(found, dict(flat(unpack(path.read_bytes()))))
    twin = FORMATS / architecture / f"flax_safetensors{untied}" / "model.safetensors"
    tensors = read_safetensors(FileSource(twin))[0]
    assert {tensor.name for tensor in tensors} == found.keys()
    assert all(same(tensor.read(), found[tensor.name]) for tensor in tensors)


@ARCHITECTURES
def test_shards(architecture: str) -> None:
    folder = FORMATS / architecture / "msgpack_sharded"
    together = {k: v for file in sorted(folder.glob("*.msgpack")) for k, v in read(file).items()}
    whole = read(FORMATS / architecture / "msgpack" / "flax_model.msgpack")
    assert together.keys() == whole.keys()
    assert all(same(together[name], whole[name]) for name in whole)


def test_it_is_told_from_every_other_file() -> None:
    for file in FORMATS.parent.rglob("*.*"):
        with open(file, "rb") as stream:
            start = stream.read(512)
        assert matches(start) == (file.suffix == ".msgpack"), file
    for start in (b"", b"\x80", b"\x80\x02}q\x00", b"\x81", b"\xde\x00", b"\x89PNG", b"\xc1\xa1"):
        assert not matches(start)
    assert matches(pack({"a" * 600: np.zeros(1)})[:512])
    assert matches(pack({str(n): n for n in range(20)})[:512])
    assert matches(pack({str(n): n for n in range(70000)})[:512])


def test_the_values_are_not_read_when_a_file_is_opened(tmp_path: Path) -> None:
    wanted = {f"a{n}": np.ones((1000, 100), np.float32) for n in range(20)}
    source = FileSource(write_file(create_msgpack, tmp_path / "file", wanted))
    with patch.object(source, "read_into", wraps=source.read_into) as calls:
        tensors, _ = read_msgpack(source)
        assert sum(len(call.args[0]) for call in calls.call_args_list) < 200_000
        assert same(tensors[7].read_slice(0, 5, 7), np.ones((2, 100), np.float32))


# --- any tree -----------------------------------------------------------------------------------

keys = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="."), max_size=40)
trees = st.dictionaries(
    keys,
    st.recursive(
        arrays(), lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3), max_leaves=6
    ),
    min_size=1,
    max_size=3,
)


@given(trees, st.sampled_from([2**30, 16, 1]))
def test_written_as_flax_does_and_read_back(tree: Any, limit: int) -> None:
    wanted = dict(flat(tree))
    with TemporaryDirectory() as folder, patch.object(msgpack_writer, "MAX_CHUNK", limit):
        path = write_file(create_msgpack, Path(folder) / "file", wanted, 24)
        assert_equal(read(path), wanted)
        content = path.read_bytes()
    assert_equal(dict(flat(unpack(content))), wanted)
    if limit == 2**30:
        assert content == pack(tree)


def test_a_map_of_many(tmp_path: Path) -> None:
    tree = {"layers": {str(n): {"bias": np.arange(n % 5)} for n in range(300)}}
    wanted = dict(flat(tree))
    path = write_file(create_msgpack, tmp_path / "file", wanted)
    assert path.read_bytes() == pack(tree)
    assert_equal(read(path), wanted)


def test_every_dtype(tmp_path: Path) -> None:
    wanted = some(*DTYPES.values())
    assert_equal(read(write_file(create_msgpack, tmp_path / "file", wanted)), wanted)


def test_parts_are_those_of_flax(tmp_path: Path) -> None:
    """Flax counts bytes: an array of exactly the limit stays whole; parts hold whole elements."""
    whole, more = np.arange(25, dtype=np.float32), np.arange(26, dtype=np.float32).reshape(2, 13)
    with patch.object(msgpack_writer, "MAX_CHUNK", 101):
        path = write_file(create_msgpack, tmp_path / "file", {"w": whole, "m.e": more}, 7)
    parts = {"0": more.reshape(-1)[:25], "1": more.reshape(-1)[25:]}
    chunked = {CHUNKED: True, "shape": {"0": 2, "1": 13}, "chunks": parts}
    assert path.read_bytes() == pack({"w": whole, "m": {"e": chunked}})
    tensor = read_msgpack(FileSource(path))[0][1]
    assert same(tensor.read_slice(1, 3, 13), more[:, 3:])
    assert same(np.concatenate(list(tensor.blocks(8))), more)


def test_what_is_no_array_is_left_out() -> None:
    a = np.arange(3, dtype=np.int32)
    others = (None, True, False, -1, -100, -70000, 2**63, -(2**62), 1.5, "text", b"bytes", 70000)
    complex_number = msgpack.ExtType(2, msgpack.packb((1.0, 2.0)))
    tree = {"others": {str(i): o for i, o in enumerate(others)}, "c": complex_number, "a": a}
    tree |= {"float": msgpack.Timestamp(1), "none": {}, "step": array(np.array(7), code=3)}
    assert_equal(read(pack(tree)), {"a": a, "step": np.array(7)})


# --- files that lie -----------------------------------------------------------------------------

ONE = np.arange(4, dtype=np.float32)
WHOLE = pack({"model": {"a": ONE, "b": np.ones((2, 3), np.float16)}, "n": 1})


def nested(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + pack(ONE)


def chunks(**fields: Any) -> bytes:
    record = {CHUNKED: True, "shape": {"0": 4}, "chunks": {"0": ONE[:3], "1": ONE[3:]}}
    return pack({"w": {key: value for key, value in (record | fields).items() if value != "-"}})


LIES = {
    "nothing": (b"", "expected 1 bytes, found the end"),
    "no map": (pack(ONE), "expected MAP, found EXT"),
    "a list": (pack({"a": [ONE]}), "to which Flax turns lists"),
    "an empty map": (pack({}), "found no array"),
    "no array": (pack({"a": {"b": 1}}), "found no array"),
    "trailing": (WHOLE + b"\0", "expected the end of the file"),
    "an unknown byte": (b"\x81\xa1a\xc1", "0xc1, which begins none"),
    "a number as key": (pack({1: ONE}), "expected TEXT, found UINT"),
    "bytes as key": (pack({b"a": ONE}), "expected TEXT, found BYTES"),
    "a dot in a key": (pack({"a.b": ONE}), "keys without '.'.*'a.b'"),
    "a key twice": (b"\x82" + pack({"a": ONE})[1:] * 2, "keys that differ, found 'a' twice"),
    "a broken key": (b"\x81\xa1\xff\x00", "a key in UTF-8"),
    "a long key": (pack({"a" * 5000: ONE}), "a key of at most 4000 bytes, found 5000"),
    "a key of 4 GB": (b"\x81\xdb\xff\xff\xff\xff", "a key of at most 4000 bytes"),
    "long names": (pack({"a" * 600: {"b" * 600: ONE}}), "at most 1000 characters, found 1201"),
    "4 billion entries": (b"\xdf\xff\xff\xff\xff\xa1a\x01", "the end of the file"),
    "many entries": (pack({str(n): n for n in range(40_000)}), "at most 30000 values"),
    "deep": (nested(65), "maps at most 64 deep"),
    "very deep": (nested(300_000), "maps at most 64 deep"),
    "text of 4 GB": (b"\x81\xa1a\xdb\xff\xff\xff\xff", "4294967295 bytes, found the end"),
    "extension of 4 GB": (b"\x81\xa1a\xc9\xff\xff\xff\xff\x05", "found the end"),
    "array of nothing": (pack({"a": msgpack.ExtType(1, b"")}), "the end of the file"),
    "array of two": (pack({"a": msgpack.ExtType(1, pack((1, 2)))}), "'a': a shape, a dtype"),
    "shape of a number": (pack({"a": array(ONE, shape=4)}), "expected LIST, found UINT"),
    "negative shape": (pack({"a": array(ONE, shape=(-4,))}), "expected UINT, found OTHER"),
    "shape of floats": (pack({"a": array(ONE, shape=(4.0,))}), "expected UINT, found OTHER"),
    "33 dimensions": (pack({"a": array(ONE, shape=(1,) * 33)}), "'a': a shape, a dtype"),
    "huge shape": (pack({"a": array(ONE, shape=(2**63, 2**63))}), "'a': expected a shape"),
    "object dtype": (pack({"a": array(ONE, dtype="object")}), "a dtype of float64.*b'object'"),
    "other byte order": (pack({"a": array(ONE, dtype=">f4")}), "a dtype of float64.*b'>f4'"),
    "strange dtype": (pack({"a": array(ONE, dtype="\xff" * 5000)}), "a dtype of float64"),
    "values missing": (pack({"a": array(ONE, values=b"123")}), "16 bytes for float32"),
    "another shape": (pack({"a": array(ONE, shape=(3,))}), "12 bytes for float32"),
    "more around it": (
        pack({"a": msgpack.ExtType(1, pack(((4,), "float32", ONE.tobytes())) + b"\0")}),
        "16 bytes for float32 .4,., 17 by the length around",
    ),
    "root in parts": (chunks()[3:], "one array without a name"),
    "parts without a shape": (chunks(shape="-"), "'w': a map of 0, 1"),
    "parts without parts": (chunks(chunks="-"), "'w': a map of 0, 1"),
    "no parts": (chunks(chunks={}), "'w': a shape and flat parts"),
    "too few parts": (chunks(chunks={"0": ONE[:3]}), "'w': expected parts"),
    "parts of other dtypes": (chunks(chunks={"0": ONE[:3], "1": ONE[:1] > 0}), "expected parts"),
    "parts with a hole": (chunks(chunks={"0": ONE[:3], "2": ONE[3:]}), "'w': a map of 0, 1"),
    "parts of numbers": (chunks(chunks={"0": ONE[:3], "1": 1}), "'w': a shape and flat parts"),
    "parts of matrices": (chunks(chunks={"0": ONE.reshape(2, 2)}), "'w': expected parts"),
    "lengths of text": (chunks(shape={"0": "4"}), "'w': a shape and flat parts"),
    "another length": (chunks(shape={"0": 5}), "'w': expected parts"),
    "more in the record": (chunks(more=1), "'w': a shape and flat parts"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), LIES.values(), ids=LIES)
def test_a_file_that_lies_is_refused_by_name(content: bytes, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(FormatError, match=f"(?s)flax_model.msgpack: .*{message}"):
        read(content)
    assert time.monotonic() - began < 2


def test_the_tables_are_sound() -> None:
    """What is a lie above is one by the change that its name tells: unchanged, these are read."""
    assert_equal(read(chunks()), {"w": ONE})
    assert_equal(read(nested(64)), {".".join("a" * 64): ONE})
    assert_equal(read(pack({"a": array(ONE)})), {"a": ONE})


def test_truncated_at_every_byte() -> None:
    for end in range(len(WHOLE)):
        with pytest.raises(FormatError):
            read(WHOLE[:end])


@pytest.mark.parametrize("content", [WHOLE, chunks()], ids=["whole", "parts"])
def test_any_bit_flipped_gives_tensors_or_a_refusal(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "flax_model.msgpack"
    refused = 0
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert sum(tensor.nbytes for tensor in read(path).values()) <= len(content)
        except FormatError:
            refused += 1
    assert refused > len(content)


@given(st.binary(min_size=1, max_size=12), st.integers(0, len(WHOLE)))
def test_what_we_take_the_library_takes(junk: bytes, position: int) -> None:
    content = WHOLE[:position] + junk + WHOLE[position + len(junk) :]
    try:
        found = read(content)
    except FormatError:
        return
    extensions: list[bytes] = []
    try:
        msgpack.unpackb(
            content,
            ext_hook=lambda code, data: extensions.append(data) if code in (1, 3) else None,
            unicode_errors="replace",
        )
    except ValueError as error:
        if "timestamp" in str(error).lower():
            return  # we leave out dates, whatever they say
        raise
    values = [msgpack.unpackb(data, raw=True)[2] for data in extensions]
    assert [array.tobytes() for array in found.values()] == values


# --- what cannot be written ---------------------------------------------------------------------

UNWRITABLE = {
    "a name twice": (["a", "a"], "a: expected a name of its own"),
    "a name that goes on": (["a", "a.b"], "a.b: expected a name that does not go on from 'a'"),
    "a name that stops": (["a.b", "a"], "a: expected a name of its own"),
    "the mark of parts": ([f"a.{CHUNKED}"], "what marks an array in parts"),
    "a deep name": ([".".join("a" * 61)], "in 60 parts, found 121 in 61"),
    "a long name": (["a" * 901], "at most 900 characters"),
}


@pytest.mark.parametrize(("names", "message"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_names_that_make_no_tree_are_refused(
    names: list[str], message: str, tmp_path: Path
) -> None:
    infos = [TensorInfo(name, np.dtype(np.float32), (2,), tmp_path) for name in names]
    with pytest.raises(InputError, match=message):
        create_msgpack(tmp_path / "file", infos, {})
    assert not (tmp_path / "file").exists()


def test_the_deepest_and_longest_names_are_read_back(tmp_path: Path) -> None:
    wanted = {".".join("a" * 60): ONE, "b" * 900: ONE, "\U0001f600" * 900: ONE}
    with patch.object(msgpack_writer, "MAX_CHUNK", 4):
        assert_equal(read(write_file(create_msgpack, tmp_path / "file", wanted)), wanted)


def test_a_dtype_that_flax_does_not_know_is_refused(tmp_path: Path) -> None:
    tensor = LazyTensor.from_array("a", np.zeros(3, np.complex128))
    with pytest.raises(InputError, match="a: expected a dtype of float64, .*complex128"):
        create_msgpack(tmp_path / "file", [tensor], {})


def test_a_hostile_million_takes_little_time_and_memory(tmp_path: Path) -> None:
    """As many arrays as may be, each under a long name."""
    entry = b"\xa6%06d" + pack(array(np.zeros(0, np.int8)))
    inner = b"".join(entry % n for n in range(29_000))
    content = (
        b"\x81\xda" + struct.pack(">H", 990) + b"a" * 990 + b"\xde" + struct.pack(">H", 29_000)
    )
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(content + inner)
    began = time.monotonic()
    assert len(read_msgpack(FileSource(path))[0]) == 29_000
    assert time.monotonic() - began < 2
