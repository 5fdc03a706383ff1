# SPDX-License-Identifier: Apache-2.0
"""Orbax directories: ours there and back, tensorstore's read, hostile ones refused."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import arrays, same

from opt_core.checkpoints import orbax_writer
from opt_core.checkpoints.checksums import crc32c
from opt_core.checkpoints.ocdbt import read_ocdbt
from opt_core.checkpoints.orbax_format import find_orbax, read_orbax
from opt_core.checkpoints.orbax_writer import create_orbax
from opt_core.checkpoints.tensors import LazyTensor, TensorInfo
from opt_core.checkpoints.values import memory_value, scan
from opt_core.checkpoints.zstd import decode, decode_into
from opt_core.errors import CheckpointError, FormatError, InputError

Arrays = Mapping[str, NDArray[Any]]
KERNEL = np.arange(48, dtype=np.float32).reshape(8, 6)


def write(folder: Path, state: Arrays, block: int = 2**20) -> Path:
    """Write with blocks of rows that do not fit the chunks."""
    infos = [TensorInfo(name, array.dtype, array.shape, folder) for name, array in state.items()]
    file = create_orbax(folder, infos, {"made by": "a test"})
    for name, array in state.items():
        flat = np.ascontiguousarray(array).reshape(-1)
        file.write(name, (flat[start : start + block] for start in range(0, flat.size, block)))
    file.finish()
    file.close()
    return folder


def read(folder: Path) -> dict[str, LazyTensor]:
    return {tensor.name: tensor for tensor in read_orbax(folder)[0]}


def tree(folder: Path, names: list[str], **more: Any) -> None:
    """Write the metadata of orbax for arrays of these names."""
    entries = {
        name: {
            "key_metadata": [{"key": key, "key_type": 2} for key in name.split(".")],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
        for name in names
    }
    folder.mkdir(exist_ok=True)
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": entries, **more}))


def save(
    folder: Path, state: Arrays, *, ocdbt: bool, zarr3: bool, chunks: list[int] | None
) -> Path:
    """Write as orbax does, with tensorstore."""
    tree(folder, list(state))
    file = {"driver": "file", "path": f"{folder}/"}
    base = {"driver": "ocdbt", "base": file} if ocdbt else file
    for name, array in state.items():
        chunk = chunks[: array.ndim] if chunks else list(array.shape)
        spec: dict[str, Any] = {
            "driver": "zarr3" if zarr3 else "zarr",
            "kvstore": base,
            "path": f"{name}/",
            "create": True,
        }
        if zarr3:
            inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}]
            shards = [2 * length for length in chunk] if chunks else chunk
            sharding = {"chunk_shape": chunk, "codecs": inner}
            spec["metadata"] = {
                "shape": array.shape,
                "data_type": array.dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shards}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            }
        else:
            spec["dtype"] = array.dtype.name
            spec["metadata"] = {
                "shape": array.shape,
                "chunks": chunk,
                "compressor": {"id": "zstd", "level": 1},
            }
        spec["store_data_equal_to_fill_value"] = True
        tensorstore.open(spec).result().write(array).result()
    return folder


STATE: Arrays = {
    "params.model.fc1.kernel": np.random.default_rng(0).standard_normal((9, 7), np.float32),
    "params.model.fc1.bias": np.zeros(7, ml_dtypes.bfloat16),
    "params.step": np.arange(5, dtype=np.int32),
}


# ---- there and back -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(state=st.lists(arrays(), max_size=3), block=st.integers(1, 300), rows=st.integers(1, 300))
def test_there_and_back(state: list[NDArray[Any]], block: int, rows: int, tmp_path_factory) -> None:
    named = {f"params.layers.{number}.kernel": array for number, array in enumerate(state)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax_writer, "BLOCK", rows)
        folder = write(tmp_path_factory.mktemp("orbax") / "model", named, block)
    tensors, metadata = read_orbax(folder)
    assert metadata == {"made by": "a test"}
    assert [tensor.name for tensor in tensors] == list(named)
    for tensor, array in zip(tensors, state, strict=True):
        assert same(tensor.read(), np.ascontiguousarray(array).reshape(array.shape))
        assert same(tensor.map(), tensor.read())
        blocks = list(tensor.blocks(64))
        assert b"".join(part.tobytes() for part in blocks) == tensor.read().tobytes()


def test_slices_read_the_chunks_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax_writer, "BLOCK", 48)
    tensor = read(write(tmp_path / "o", {"kernel": KERNEL}))["kernel"]
    assert tensor.streams
    assert same(tensor.read_slice(0, 3, 6), KERNEL[3:6])
    assert same(tensor.read_slice(1, 2, 3), KERNEL[:, 2:3].copy())
    part = tensor.rows(1, 8).rows(2, 6)
    assert same(part.read(), KERNEL[3:7])
    assert [len(block) for block in part.blocks(1)] == [1, 2, 1]  # at the bounds of the chunks
    with pytest.raises(InputError, match="within shape"):
        tensor.read_slice(0, 3, 9)
    (tmp_path / "o" / "kernel" / "0.0").unlink()
    assert same(tensor.read_slice(0, 2, 4), KERNEL[2:4])
    with pytest.raises(FileNotFoundError):
        tensor.read_slice(0, 1, 3)
    (tmp_path / "o" / "kernel" / "1.0").write_bytes(bytes(48))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        tensor.read_slice(0, 2, 4)


def test_neither_way_needs_tensorstore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = save(tmp_path / "theirs", STATE, ocdbt=True, zarr3=False, chunks=None)
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    assert same(read(write(tmp_path / "ours", {"kernel": KERNEL}))["kernel"].read(), KERNEL)
    assert same(read(theirs)["params.step"].read(), STATE["params.step"])


@pytest.mark.parametrize("name", ["a..b", "", "a/b", "../a", "a.b.c", ".a"])
def test_names_that_are_no_keys_are_not_written(tmp_path: Path, name: str) -> None:
    infos = [TensorInfo(key, KERNEL.dtype, (1,), tmp_path) for key in ("a.b", name)]
    with pytest.raises(InputError, match="keys joined"):
        create_orbax(tmp_path / "o", infos, {})
    assert not (tmp_path / "o").exists()


def test_a_dtype_without_a_place_is_not_written(tmp_path: Path) -> None:
    info = TensorInfo("a", np.dtype(np.complex128), (1,), tmp_path)
    with pytest.raises(InputError, match="complex128"):
        create_orbax(tmp_path / "o", [info], {})


# ---- tensorstore's ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [None, [2, 3]])
@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("ocdbt", [False, True])
def test_reads_what_tensorstore_writes(
    tmp_path: Path, ocdbt: bool, zarr3: bool, chunks: list[int] | None
) -> None:
    tensors = read(save(tmp_path / "o", STATE, ocdbt=ocdbt, zarr3=zarr3, chunks=chunks))
    assert list(tensors) == list(STATE)
    for name, array in STATE.items():
        assert same(tensors[name].read(), array)
        assert tensors[name].streams == (chunks is not None)
        assert same(tensors[name].read_slice(0, 1, 4), array[1:4])
        assert same(np.concatenate(list(tensors[name].rows(1, 5).blocks(1))), array[1:5])


def test_a_large_database_of_several_nodes(tmp_path: Path) -> None:
    """Nodes too large for the decoder to know their size in advance, and a tree of height 1."""
    expected = {f"layers.{n}.kernel/.zarray": os.urandom(40) * (1 + n % 4) for n in range(3000)}
    config = {"max_decoded_node_bytes": 100_000}
    for folder, more in ((tmp_path / "one", {}), (tmp_path / "tree", {"config": config})):
        spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, **more}
        store = tensorstore.KvStore.open(spec).result()
        with tensorstore.Transaction() as transaction:
            for key, data in expected.items():
                store.with_transaction(transaction)[key] = data
        values = read_ocdbt(folder, scan(folder))
        assert {key: bytes(value.read()) for key, value in values.items()} == expected


def test_the_folder_is_found(tmp_path: Path) -> None:
    assert find_orbax(tmp_path) is None
    assert find_orbax(tmp_path / "nothing") is None
    step = tmp_path / "100"
    tree(step.parent / "100.orbax-checkpoint-tmp-7", [])
    assert find_orbax(tmp_path) is None  # unfinished
    tree(step, [])
    assert find_orbax(step) == find_orbax(tmp_path) == step
    tree(tmp_path / "other", [])
    assert find_orbax(tmp_path) is None  # which of two?
    tree(tmp_path / "default", [])
    assert find_orbax(tmp_path) == tmp_path / "default"
    (tmp_path / "file").write_bytes(b"")
    assert find_orbax(tmp_path / "file") is None


def test_leaves_that_are_no_arrays_are_passed_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "o", {"a": KERNEL})
    content = json.loads((folder / "_METADATA").read_text())
    for kind in ("scalar", "string", "None", "Dict"):
        content["tree_metadata"][kind] = {
            "key_metadata": [{"key": kind, "key_type": 2}],
            "value_metadata": {"value_type": kind},
        }
    content["custom_metadata"] = {"text": "kept", "number": 1}
    (folder / "_METADATA").write_text(json.dumps(content))
    tensors, metadata = read_orbax(folder)
    assert [tensor.name for tensor in tensors] == ["a"]
    assert metadata == {"text": "kept"}


# ---- links and paths ----------------------------------------------------------------------------


def test_links_lead_nowhere_else(tmp_path: Path) -> None:
    folder = write(tmp_path / "o", {"a": KERNEL})
    outside = tmp_path / "secret"
    outside.write_bytes((folder / "a" / "0.0").read_bytes())
    (folder / "a" / "0.0").unlink()
    (folder / "a" / "0.0").symlink_to(outside)
    with pytest.raises(FormatError, match="found a link"):
        read_orbax(folder)
    (folder / "a" / "0.0").unlink()
    outside.rename(folder / "inside")
    (folder / "a" / "0.0").symlink_to(folder / "inside")
    assert same(read(folder)["a"].read(), KERNEL)
    (folder / "loop").symlink_to(folder)
    with pytest.raises(FormatError, match="found a link"):
        read_orbax(folder)


def test_the_links_of_the_hubs_cache(tmp_path: Path) -> None:
    model = tmp_path / "models--org--name"
    folder = write(tmp_path / "o", {"a": KERNEL})
    snapshot = model / "snapshots" / "123" / "orbax"
    (model / "blobs").mkdir(parents=True)
    for number, file in enumerate(path for path in folder.rglob("*") if path.is_file()):
        blob = file.rename(model / "blobs" / str(number))
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert find_orbax(snapshot.parent) == snapshot
    assert same(read(snapshot)["a"].read(), KERNEL)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "o", {"a": KERNEL})
    os.mkfifo(folder / "a" / "1.0")
    with pytest.raises(FormatError, match="something else"):
        read_orbax(folder)


@pytest.mark.parametrize("key", ["..", "../../etc", "/etc", "a/b", "", ".", 3, None, {}, "a\\b"])
def test_keys_are_no_paths(tmp_path: Path, key: Any) -> None:
    folder = write(tmp_path / "o", {"a": KERNEL})
    content = json.loads((folder / "_METADATA").read_text())
    content["tree_metadata"]["('a',)"]["key_metadata"][0]["key"] = key
    (folder / "_METADATA").write_text(json.dumps(content))
    with pytest.raises(FormatError, match="plain names"):
        read_orbax(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"tree_metadata": 1}', '{"tree_metadata": {"a": 1}}', "[" * 10**6]
)
def test_metadata_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "_METADATA").write_text(text)
    with pytest.raises(FormatError):
        read_orbax(tmp_path)


# ---- zarr ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shape", [2**40, 6], "chunks"),
        ("shape", [9, 6], "found 1 values|the chunk"),
        ("shape", [-1, 6], "lengths"),
        ("shape", [True, 6], "lengths"),
        ("shape", 8, "lengths"),
        ("shape", [8] * 40, "lengths"),
        ("shape", [8], "chunks"),
        ("chunks", [0, 6], "lengths"),
        ("chunks", [2**50, 6], "bytes for a chunk|declared"),
        ("chunks", [7, 6], "bytes for a chunk"),
        ("dtype", "|O", "dtype"),
        ("dtype", "<U8", "dtype"),
        ("dtype", ">f4", "dtype"),
        ("dtype", [["x", "<f4"]], "dtype"),
        ("dtype", "<f8", "bytes for a chunk"),
        ("order", "F", "order"),
        ("filters", [{"id": "pickle"}], "filters"),
        ("compressor", {"id": "pickle"}, "compressor"),
        ("compressor", {"id": "blosc"}, "compressor"),
        ("compressor", "zstd", "found"),
        ("compressor", {}, "id"),
        ("zarr_format", 1, "zarr_format"),
        ("dimension_separator", "/../", "dimension_separator"),
    ],
)
def test_lying_zarr(tmp_path: Path, field: str, value: Any, message: str) -> None:
    folder = write(tmp_path / "o", {"a": KERNEL})
    content = json.loads((folder / "a" / ".zarray").read_text())
    content[field] = value
    (folder / "a" / ".zarray").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=message):
        read_orbax(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda zarr: zarr["codecs"].append({"name": "gzip"}),
        lambda zarr: zarr.update(codecs=[{"name": "transpose"}]),
        lambda zarr: zarr.update(data_type="string"),
        lambda zarr: zarr.update(node_type="group"),
        lambda zarr: zarr["chunk_key_encoding"].update(name="http"),
        lambda zarr: zarr["codecs"][0]["configuration"].update(chunk_shape=[5, 7]),
        lambda zarr: zarr["codecs"][0]["configuration"].update(chunk_shape=[1, 1]),
        lambda zarr: zarr["codecs"][0]["configuration"].update(index_codecs=[]),
        lambda zarr: zarr.pop("chunk_grid"),
        lambda zarr: zarr.update(chunk_grid=3),
    ],
)
def test_lying_zarr_of_version_3(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    name = "params.model.fc1.kernel"
    folder = save(tmp_path / "o", STATE, ocdbt=False, zarr3=True, chunks=None)
    content = json.loads((folder / name / "zarr.json").read_text())
    change(content)
    (folder / name / "zarr.json").write_text(json.dumps(content))
    with pytest.raises(FormatError):
        read(folder)[name].read()


def test_an_index_of_a_shard_that_lies(tmp_path: Path) -> None:
    name = "params.model.fc1.kernel"
    folder = save(tmp_path / "o", STATE, ocdbt=False, zarr3=True, chunks=None)
    file = folder / name / "c" / "0" / "0"
    data = file.read_bytes()[:-20]
    for offset, length in ((2**64 - 1, 2**64 - 1), (0, 2**40), (2**60, 5), (0, 3)):
        index = struct.pack("<QQ", offset, length)
        file.write_bytes(data + index + struct.pack("<I", crc32c(index)))
        with pytest.raises(FormatError):
            read(folder)[name].read()
    file.write_bytes(data + index + bytes(4))
    with pytest.raises(FormatError, match="checksum"):
        read(folder)[name].read()


def test_missing_chunks_are_no_zeros(tmp_path: Path) -> None:
    folder = save(tmp_path / "o", STATE, ocdbt=False, zarr3=False, chunks=[4, 4])
    (folder / "params.model.fc1.kernel" / "1.1").unlink()
    with pytest.raises(FormatError, match=r"the chunk params.model.fc1.kernel/1.1, found none"):
        read_orbax(folder)


def test_far_more_declared_than_stored(tmp_path: Path) -> None:
    """Zeros compress 20,000 to one; so do bombs."""
    zeros = {"bias": np.zeros(2**22, np.float32)}
    folder = save(tmp_path / "small", zeros, ocdbt=True, zarr3=False, chunks=None)
    assert not read(folder)["bias"].read().any()
    zeros = {f"bias{number}": zeros["bias"] for number in range(3)}
    folder = save(tmp_path / "large", zeros, ocdbt=True, zarr3=False, chunks=None)
    with pytest.raises(FormatError, match="without compression"):
        read_orbax(folder)


# ---- zstd ---------------------------------------------------------------------------------------


def rle(size: int) -> bytes:
    """A zstd frame of zeros in blocks of 128 KiB, four bytes each."""
    blocks = [(min(2**17, size - start), start) for start in range(0, size, 2**17)]
    frame = b"\x28\xb5\x2f\xfd\x00\x88"
    for length, start in blocks:
        last = start + length == size
        frame += (length << 3 | 1 << 1 | last).to_bytes(3, "little") + b"\0"
    return frame


def decoded(frame: bytes, size: int) -> bytes:
    out = np.empty(size, np.uint8)
    decode_into(memory_value(frame), out, "x")
    return out.tobytes()


def test_a_frame_holds_what_it_should() -> None:
    for size in (1, 1000, 2**17 + 5, 2**23 + 1):
        frame = rle(size)
        assert decoded(frame, size) == decode(memory_value(frame), 2**24, "x") == bytes(size)
        with pytest.raises(FormatError, match="found more"):
            decoded(frame, size - 1)
        with pytest.raises(FormatError, match=f"expected {size + 1} bytes in zstd, found {size}"):
            decoded(frame, size + 1)
        with pytest.raises(FormatError, match="found more"):
            decode(memory_value(frame), size - 1, "x")
    for broken in (b"", b"abc", b"abcdefgh", rle(1000)[:-3], rle(1000)[:9]):
        with pytest.raises(FormatError):
            decode(memory_value(broken), 1000, "x")
        with pytest.raises(FormatError):
            decoded(broken, 1000)


def test_a_bomb_is_not_blown_up() -> None:
    resource = pytest.importorskip("resource")
    frame = rle(2**32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    with pytest.raises(FormatError, match="found more"):
        decoded(frame, 1000)
    with pytest.raises(FormatError, match="found more"):
        decode(memory_value(frame), 2**20, "x")
    assert time.monotonic() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


# ---- OCDBT --------------------------------------------------------------------------------------


def varint(*values: int) -> bytes:
    data = bytearray()
    for value in values:
        while value > 127:
            data.append(value & 127 | 128)
            value >>= 7
        data.append(value)
    return bytes(data)


def sealed(magic: int, body: bytes, compression: int = 0) -> bytes:
    """Put a body into the envelope of a manifest or node."""
    data = struct.pack(">I", magic) + struct.pack("<Q", 18 + len(body)) + varint(0, compression)
    return data + body + struct.pack("<I", crc32c(data + body))


def table(path: bytes) -> bytes:
    """A table of one data file."""
    return varint(1, len(path), 0) + path


def leaf(path: bytes = b"d", keys: bytes | None = None, runs: tuple[int, ...] = (0, 4)) -> bytes:
    """A leaf with values in a data file: keys a, b, ... unless told otherwise; offset, length, ..."""
    count = len(runs) // 2
    if keys is None:
        keys = varint(count, *[0] * (count - 1), *[1] * count) + b"abcdefgh"[:count]
    where = varint(*runs[1::2]) + b"\1" * count + varint(*[0] * count, *runs[::2])
    return sealed(0x0CDB20DE, b"\0" + table(path) + keys + where)


def parent(height: int, length: int) -> bytes:
    """A node with one child: the data file from its start on."""
    child = varint(1, 1, 1) + b"a" + varint(0, 0, length, 1, 1, 1)
    return sealed(0x0CDB20DE, bytes([height]) + table(b"d") + child)


def manifest(length: int, height: int = 0, path: bytes = b"d", versions: int = 1) -> bytes:
    config = bytes(16) + b"\0" + varint(100, 100) + b"\4" + varint(0)
    version = varint(versions, 1) + bytes([height]) + varint(0, 0, length, 1, 1, 1) + bytes(8)
    return sealed(0x0CDB3A2A, config + table(path) + version + varint(0))


def database(folder: Path, data: bytes, top: bytes | None = None) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    (folder / "d").write_bytes(data)
    (folder / "manifest.ocdbt").write_bytes(manifest(len(data)) if top is None else top)
    return dict(read_ocdbt(folder, scan(folder)))


def test_the_database_of_this_test_is_sound(tmp_path: Path) -> None:
    """Else what follows would be refused for other reasons."""
    values = database(tmp_path, leaf(runs=(0, 4, 4, 4)))
    assert values["a"].read() == b"\x0c\xdb\x20\xde"
    assert list(values) == ["a", "b"]
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/"}}
    assert tensorstore.KvStore.open(store).result().list().result() == [b"a", b"b"]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (leaf(b"../secret"), "found none"),
        (leaf(b"/etc/hostname"), "found none"),
        (leaf(runs=(0, 2**40)), "a file of"),
        (leaf(runs=(2**63, 4)), "a file of"),
        (leaf(runs=(0, 4, 3, 4)), "lie apart"),
        (leaf(keys=varint(1, 1) + b"\xff"), "UTF-8"),
        (leaf(keys=varint(1, 600) + b"x" * 600), "names of at most"),
        (leaf(keys=varint(1, 2**50)), "names of at most"),
        (leaf(keys=varint(2**50)), "entries"),
        (leaf(keys=varint(2, 5, 1, 1) + b"ab", runs=(0, 4, 4, 4)), "names of at most"),
        (leaf(keys=varint(2, 0, 1, 1) + b"aa", runs=(0, 4, 4, 4)), "twice"),
        (leaf(keys=b"\xff" * 11), "number below"),
        (leaf()[:-1], "begin with"),
        (leaf()[:-1] + b"\0", "checksum"),
        (sealed(0x0CDB20DE, b""), "more bytes"),
        (sealed(0x0CDB20DE, b"\3"), "height"),
        (sealed(0x0CDB20DE, b"", 2), "compression"),
        (sealed(0x0CDB20DE, rle(2**30), 1), "found more"),
        (sealed(0x0CDB20DE, b"no frame", 1), "zstd"),
    ],
)
def test_lying_nodes(tmp_path: Path, node: bytes, message: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(100))
    begin = time.monotonic()
    with pytest.raises(FormatError, match=message):
        database(tmp_path / "o", node)
    assert time.monotonic() - begin < 2


def test_a_tree_that_bites_its_tail(tmp_path: Path) -> None:
    size = len(parent(1, 50))
    with pytest.raises(FormatError, match="height"):
        database(tmp_path, parent(1, size), manifest(size, height=1))
    with pytest.raises(FormatError, match="height"):
        database(tmp_path, parent(255, size), manifest(size, height=255))


@pytest.mark.parametrize(
    "top",
    [
        b"",
        manifest(10)[:-1],
        manifest(2**50),
        manifest(10, path=b"../d"),
        manifest(10, versions=2**40),
        manifest(10, versions=0),
        sealed(0x0CDB3A2A, rle(2**30), 1),
        sealed(0x0CDB3A2A, bytes(16) + b"\1"),
    ],
)
def test_lying_manifests(tmp_path: Path, top: bytes) -> None:
    with pytest.raises(FormatError):
        database(tmp_path, leaf(), top)


# ---- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ocdbt", "zarr3"), [(False, False), (True, False), (True, True)])
def test_damage_is_noticed_or_harmless(tmp_path: Path, ocdbt: bool, zarr3: bool) -> None:
    folder = save(tmp_path / "o", STATE, ocdbt=ocdbt, zarr3=zarr3, chunks=None)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    random = np.random.default_rng(0)
    refused = 0
    for round in range(300):
        file = files[round % len(files)]
        whole = file.read_bytes()
        data = bytearray(whole)
        at = int(random.integers(len(data)))
        if round % 3:
            data[at] ^= 1 << int(random.integers(8))
        else:
            del data[at:]
        file.write_bytes(data)
        try:
            for tensor in read_orbax(folder)[0]:
                tensor.read()
        except FormatError:
            refused += 1
        file.write_bytes(whole)
    assert refused > 100
