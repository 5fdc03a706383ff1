# SPDX-License-Identifier: Apache-2.0
"""The HDF5 reader against h5py, against damage, and against what it must refuse; the writer too."""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from checkpoint_files import Arrays, equal
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import arrays, same

from opt_core.checkpoints import CheckpointIndex, TensorInfo
from opt_core.checkpoints.hdf5_format import BFLOAT16, DTYPES, matches, read_hdf5
from opt_core.checkpoints.hdf5_writer import (
    SCOPE,
    create_keras_hdf5,
    create_tf_hdf5,
    keras_index_key,
    tf_index_key,
)
from opt_core.checkpoints.output import CreateFile
from opt_core.checkpoints.sources import FileSource
from opt_core.checkpoints.tensors import ALIGNMENT
from opt_core.dialects import DIALECTS
from opt_core.errors import FormatError, InputError, UnsupportedError

GOLDEN = Path(__file__).parents[1] / "golden" / "formats"
FILES = sorted(GOLDEN.glob("*/h5*/*.h5"))
ZEROS = np.zeros((4, 4), np.float32)

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), max_size=12)
paths = st.lists(names.filter(lambda name: name not in ("", ".")), min_size=1, max_size=3).map(
    "/".join
)
trees = st.dictionaries(paths, arrays().filter(lambda array: array.dtype in DTYPES), max_size=8)


def is_tree(tensors: Mapping[str, Any]) -> bool:
    """Whether no name is a group of another."""
    return not any(a != b and b.startswith(f"{a}/") for a in tensors for b in tensors)


def read(file: Path) -> Arrays:
    source = FileSource(file)
    tensors, metadata = read_hdf5(source)
    assert metadata == {}
    result = {tensor.name: tensor.read() for tensor in tensors}
    source.close()
    return result


def oracle(file: Path) -> Arrays:
    """The datasets as h5py and Keras see them."""
    found: Arrays = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            brief = item.attrs.get("dtype") == "bfloat16"
            found[name] = item[()].view(BFLOAT16) if brief else np.asarray(item[()])

    with h5py.File(file) as opened:
        opened.visititems(visit)
    return found


def save(file: Path, tensors: Arrays) -> None:
    """Write with h5py as Keras does."""
    with h5py.File(file, "w") as opened:
        for name, array in tensors.items():
            dataset = opened.create_dataset(name, data=array)
            if array.dtype == BFLOAT16:
                dataset.attrs["dtype"] = "bfloat16"


def write(file: Path, tensors: Arrays, create: CreateFile) -> None:
    file.unlink(missing_ok=True)
    infos = [TensorInfo(name, array.dtype, array.shape, file) for name, array in tensors.items()]
    writing = create(file, infos, {})
    for name, array in tensors.items():
        writing.write(name, [array])
    writing.finish()


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(file.parts[-3:]))
def test_files_of_the_reference(file: Path) -> None:
    """The single file nests each weight under its layer and the model's scope, shards do not."""
    expected = {
        name if name.startswith("model/decoder") else name.split("/", 2)[2]: array
        for name, array in oracle(file).items()
    }
    found = read(file)
    assert found and equal(found, expected)
    assert all(name.startswith("model/decoder/") and name.endswith(":0") for name in found)
    with file.open("rb") as opened:
        assert matches(opened.read(512))


def test_there_are_golden_files() -> None:
    assert len(FILES) == 8


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("model/tfopt_model/model/decoder/fc1/kernel:0", "model/decoder/fc1/kernel:0"),
        ("score/tfopt_for_x_1/score/kernel:0", "score/kernel:0"),
        ("model/decoder/layers.0/fc1/kernel:0", "model/decoder/layers.0/fc1/kernel:0"),
        ("a/b/a/vars/0", "a/b/a/vars/0"),
        ("a/b/a:0", "a/b/a:0"),
    ],
)
def test_names(tmp_path: Path, stored: str, name: str) -> None:
    save(tmp_path / "x.h5", {stored: ZEROS})
    assert list(read(tmp_path / "x.h5")) == [name]


def test_two_scopes_in_one_file(tmp_path: Path) -> None:
    save(tmp_path / "x.h5", {f"model/{scope}/model/fc1/kernel:0": ZEROS for scope in "ab"})
    with pytest.raises(FormatError, match="expected 'model/fc1/kernel:0' once, found it twice"):
        read(tmp_path / "x.h5")


@given(trees.filter(is_tree))
@settings(max_examples=100, deadline=None)
def test_whatever_h5py_writes(tmp_path_factory: pytest.TempPathFactory, tensors: Arrays) -> None:
    file = tmp_path_factory.getbasetemp() / "any.h5"
    save(file, tensors)
    assert equal(read(file), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    tensors = {
        "scalar": np.ones((), dtype),
        "none": np.ones((0, 3), dtype),
        "row": np.ones(3, dtype),
    }
    save(tmp_path / "x.h5", tensors)
    assert equal(read(tmp_path / "x.h5"), tensors)


def test_groups_of_many_and_names_of_many_letters(tmp_path: Path) -> None:
    """A B-tree of three levels: 8 names a table, 32 tables a node."""
    tensors = {f"g/{'n' * (i % 90)}{i}": np.full(1, i, np.int16) for i in range(2500)}
    save(tmp_path / "x.h5", tensors)
    assert equal(read(tmp_path / "x.h5"), tensors)


def test_headers_in_several_blocks(tmp_path: Path) -> None:
    """Long attributes before the one that matters, which may be of fixed length."""
    file = tmp_path / "x.h5"
    values = np.arange(4).astype(BFLOAT16)
    with h5py.File(file, "w") as opened:
        for name, text in {"variable": "bfloat16", "fixed": np.bytes_(b"bfloat16")}.items():
            dataset = opened.create_dataset(f"group/{name}", data=values)
            for number in range(20):
                dataset.attrs[f"long{number}"] = np.bytes_(b"x" * 3000 * number)
            dataset.attrs["dtype"] = text
        opened["group"].attrs["names"] = ["text"] * 3000
    assert equal(read(file), {"group/fixed": values, "group/variable": values})


def test_values_in_the_header(tmp_path: Path) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple((3,))
    with h5py.File(tmp_path / "x.h5", "w") as opened:
        made = h5py.h5d.create(opened.id, b"x", h5py.h5t.NATIVE_FLOAT, space, properties)
        h5py.Dataset(made)[:] = [1, 2, 3]
    assert same(read(tmp_path / "x.h5")["x"], np.array([1, 2, 3], np.float32))


def test_tensors_stay_in_the_file(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    write(tmp_path / "x.h5", {"x": array}, create_keras_hdf5)
    source = FileSource(tmp_path / "x.h5")
    (tensor,) = read_hdf5(source)[0]
    assert same(tensor.rows(1, 3).read(), array[1:3])
    assert same(np.asarray(tensor.map()), array)
    source.close()


# --- what is refused ------------------------------------------------------------------------------


def _virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "a", (4,))
    file.create_virtual_dataset("x", layout)


def _link(file: Any, name: str, target: Any) -> None:
    file.create_group("g")
    file[name] = target


def _twice(file: Any) -> None:
    file["a"] = ZEROS
    file["b"] = file["a"]


def _deep(file: Any) -> None:
    file["/".join("d" * 70)] = ZEROS


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "chunks": (
        lambda f: f.create_dataset("x", data=ZEROS, chunks=(2, 2)),
        "in one piece .*class 2",
    ),
    "gzip": (lambda f: f.create_dataset("x", data=ZEROS, compression="gzip"), "compressed"),
    "resizable": (lambda f: f.create_dataset("x", data=ZEROS, maxshape=(None, 4)), "chunks"),
    "external values": (
        lambda f: f.create_dataset("x", (3,), "f4", external=[("/etc/passwd", 0, 12)]),
        "a reference to another. Nothing was opened",
    ),
    "virtual": (_virtual, "in one piece"),
    "never written": (lambda f: f.create_dataset("x", (3,), "f4"), "12 bytes, found no values"),
    "big-endian": (lambda f: f.create_dataset("x", data=ZEROS.astype(">f4")), "little-endian"),
    "text": (lambda f: f.create_dataset("x", data="text"), "expected one of int8"),
    "two bytes of what": (lambda f: f.create_dataset("x", data=np.zeros(2, "V2")), "expected one"),
    "null": (lambda f: f.create_dataset("x", data=h5py.Empty("f4")), "an array or a scalar"),
    "a type alone": (lambda f: _link(f, "x", np.dtype("f4")), "expected one dataspace"),
    "soft link": (lambda f: _link(f, "x", h5py.SoftLink("/g")), "a link by name"),
    "external link": (lambda f: _link(f, "x", h5py.ExternalLink("/etc/passwd", "/")), "newer"),
    "two names": (_twice, "something else occupies .two names"),
    "a circle": (lambda f: _link(f["/"], "g/x", f), "something else occupies"),
    "new group": (lambda f: f.create_group("x", track_order=True), "newer one.*track_order"),
    "deep": (_deep, "at most 64 groups"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_weights_never_need(tmp_path: Path, make: Callable[[Any], Any], message: str) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        make(file)
    with pytest.raises(FormatError, match=rf"x.h5.*{message}"):
        read(tmp_path / "x.h5")


@pytest.mark.parametrize("version", ["latest", "v108"])
def test_newer_formats(tmp_path: Path, version: str) -> None:
    with h5py.File(tmp_path / "x.h5", "w", libver=(version, "latest")) as file:
        file["x"] = ZEROS
    with pytest.raises(FormatError, match=r"superblock [23], as libver='latest'.* h5repack"):
        read(tmp_path / "x.h5")


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every structure: groups, a heap, a bfloat16 tensor."""
    file = tmp_path_factory.mktemp("small") / "x.h5"
    write(file, {"a": np.ones(2, np.float32), "b": np.ones(2, BFLOAT16)}, create_keras_hdf5)
    return file.read_bytes()


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[[bytes], Arrays | None]:
    def attempt(data: bytes) -> Arrays | None:
        file = tmp_path / "x.h5"
        file.write_bytes(data)
        try:
            return read(file)
        except FormatError as error:
            message = str(error)
        assert str(file) in message
        return None

    return attempt


def test_truncations(small: bytes, attempt: Callable[[bytes], Arrays | None]) -> None:
    """Every seventh; those at every byte are in tests/fuzz."""
    assert attempt(small) is not None
    for length in range(0, len(small), 7):
        assert attempt(small[:length]) is None
        if length >= 48:  # the superblock says so, too
            attempt(small[:40] + struct.pack("<Q", length) + small[48:length])


def test_flipped_bits(small: bytes, attempt: Callable[[bytes], Arrays | None]) -> None:
    choose = random.Random(0)
    outcomes = set()
    for place in range(0, len(small), 5):
        data = bytearray(small)
        for other in (place, choose.randrange(len(small)))[: choose.randint(1, 2)]:
            data[other] ^= 1 << choose.randrange(8)
        outcomes.add(attempt(bytes(data)) is None)
    assert outcomes == {True, False}


@pytest.mark.parametrize("value", [0, 1, 8, 96, 800, 2**31, 2**63 - 8, 2**64 - 1])
def test_lying_numbers(small: bytes, attempt: Callable[[bytes], Arrays | None], value: int) -> None:
    """Every address and every length of the file becomes another."""
    for place in range(0, len(small) - 7, 8):
        attempt(small[:place] + struct.pack("<Q", value) + small[place + 8 :])


def test_overlapping_values(small: bytes, attempt: Callable[[bytes], Arrays | None]) -> None:
    places = [small.index(np.ones(2, dtype).tobytes()) for dtype in (np.float32, BFLOAT16)]
    layouts = [struct.pack("<BBQQ", 3, 1, places[0], 8), struct.pack("<BBQQ", 3, 1, places[1], 4)]
    assert all(small.count(layout) == 1 for layout in layouts)
    moved = struct.pack("<BBQQ", 3, 1, places[0] + 4, 4)
    assert attempt(small.replace(layouts[1], moved)) is None


# --- what is written ------------------------------------------------------------------------------


@given(trees.filter(is_tree))
@settings(max_examples=60, deadline=None)
def test_h5py_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, tensors: Arrays
) -> None:
    file = tmp_path_factory.getbasetemp() / "model.weights.h5"
    write(file, tensors, create_keras_hdf5)
    assert equal(oracle(file), tensors)
    assert equal(read(file), tensors)
    with h5py.File(file) as opened:
        offsets = [opened[name].id.get_offset() or 0 for name in tensors]
    assert all(offset % ALIGNMENT == 0 for offset in offsets)


def attribute(group: Any, name: str) -> list[str]:
    """A list of texts as Keras and transformers read it: whole, or in numbered parts."""
    parts = [group.attrs[name]] if name in group.attrs else []
    while not parts or f"{name}{len(parts)}" in group.attrs:
        parts.append(group.attrs[f"{name}{len(parts)}"])
    assert all(part.nbytes <= 64512 for part in parts)
    return [text.decode() for part in parts for text in part]


@pytest.mark.parametrize("layers", [1, 96])
def test_a_tf_model_as_transformers_reads_it(tmp_path: Path, layers: int) -> None:
    """The names of 96 layers, as 175B has, do not fit into one attribute."""
    tensors = {
        f"model/decoder/layers.{i}/self_attn/part_{j}/kernel:0": np.full(2, i, np.float16)
        for i in range(layers)
        for j in range(16)
    }
    tensors["lm_head/kernel:0"] = np.ones(3, np.float32)
    write(tmp_path / "tf_model.h5", tensors, create_tf_hdf5)
    found: Arrays = {}
    with h5py.File(tmp_path / "tf_model.h5") as file:
        assert file.attrs["backend"] == b"tensorflow"
        assert file.attrs["keras_version"].startswith(b"2.")
        assert attribute(file["top_level_model_weights"], "weight_names") == []
        for layer in attribute(file, "layer_names"):
            for name in attribute(file[layer], "weight_names"):
                found[name.partition("/")[2]] = file[layer][name][()]
    assert list(found) == list(tensors) and equal(found, tensors)
    assert equal(read(tmp_path / "tf_model.h5"), tensors)


def test_one_of_several_as_transformers_reads_it(tmp_path: Path) -> None:
    tensors = {f"model/decoder/layers.{i}/fc1/bias:0": np.full(2, i, "f4") for i in range(3)}
    file = tmp_path / "tf_model-00001-of-00002.h5.part"
    write(file, tensors, create_tf_hdf5)
    with h5py.File(file) as opened:
        found = {name: opened[name][()] for name in attribute(opened, "layer_names")}
    assert equal(found, tensors)
    assert equal(read(file), tensors)


def test_room_for_values_takes_no_memory_and_no_disk(tmp_path: Path) -> None:
    """A tensor of a terabyte is announced, and a byte in its middle is where h5py looks for it."""
    file = tmp_path / "model.weights.h5"
    info = TensorInfo("x", np.dtype(np.uint8), (2**40,), file)
    create_keras_hdf5(file, [info], {}).close()
    assert file.stat().st_blocks < 100
    with h5py.File(file) as opened:
        offset = opened["x"].id.get_offset()
    with file.open("r+b") as raw:
        raw.seek(offset + 2**39)
        raw.write(b"\7")
    with h5py.File(file) as opened:
        assert opened["x"][2**39] == 7


@pytest.mark.parametrize(
    ("dtype", "names", "message"),
    [
        (np.complex64, ["x"], "x: expected one of int8.* found complex64"),
        (np.float32, ["a/b", "a"], "a: expected a name that stands beside"),
        (np.float32, ["a", "a/b"], "a/b: expected a name that stands beside"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, dtype: Any, names: list[str], message: str) -> None:
    infos = [TensorInfo(name, np.dtype(dtype), (2,), tmp_path) for name in names]
    with pytest.raises(InputError, match=message):
        create_keras_hdf5(tmp_path / "x.weights.h5", infos, {})
    assert not list(tmp_path.iterdir())


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading does not need it."""
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UnsupportedError, match="pip install h5py"):
        create_tf_hdf5(tmp_path / "tf_model.h5", [], {})
    assert read(FILES[0])


# --- indices --------------------------------------------------------------------------------------

KERNEL, BIAS = "layers/tfopt_model/decoder/fc1/vars/0", "layers/tfopt_model/decoder/fc1/vars/1"


def test_the_index_of_keras(tmp_path: Path) -> None:
    """One key for all variables of a layer, which may lie in two files."""
    places = {KERNEL: "model_00000.weights.h5", BIAS: "model_00001.weights.h5"}
    keyed = [(keras_index_key(name), file) for name, file in places.items()]
    index = CheckpointIndex.build(tmp_path / "model.weights.json", keyed, 12)
    index.check(places)
    written = json.loads(index.to_json())
    assert written["weight_map"] == {"/layers/tfopt_model/decoder/fc1/vars": [*places.values()]}
    for name in places.values():
        (tmp_path / name).touch()
    index.file.write_text(index.to_json())
    again = CheckpointIndex.read(index.file)
    again.check(places)
    assert [shard.name for shard in again.shards] == [*places.values()]
    with pytest.raises(
        FormatError, match="fc1/vars': expected in .*00000.*and.*00001.*, found it in"
    ):
        again.check({KERNEL: "model_00000.weights.h5"})
    with pytest.raises(FormatError, match="found 'other' of .* missing"):
        again.check({**places, "other": "model_00000.weights.h5"})


@pytest.mark.parametrize("folder", ["pre_norm", "post_norm"])
def test_the_index_of_the_reference(folder: str) -> None:
    index = CheckpointIndex.read(GOLDEN / folder / "h5_sharded" / "tf_model.h5.index.json")
    places = {name: shard.name for shard in index.shards for name in read(shard)}
    index.check(places)
    assert {tf_index_key(name) for name in places} == {
        key.replace("tfopt_for_causal_lm_1/", f"{SCOPE}/") for key in index.weight_map
    }
    with pytest.raises(
        FormatError, match="expected in tf_model-00001-of-00003.h5, found it nowhere"
    ):
        index.check({})


def test_the_shards_of_the_reference_are_of_the_dialect() -> None:
    index = CheckpointIndex.read(GOLDEN / "pre_norm" / "h5_sharded" / "tf_model.h5.index.json")
    found = {name for shard in index.shards for name in read(shard)}
    single = set(read(GOLDEN / "pre_norm" / "h5" / "tf_model.h5"))
    assert found == single and all(name.endswith(DIALECTS["tf"].suffix) for name in found)


def test_an_index_with_an_empty_list(tmp_path: Path) -> None:
    file = tmp_path / "model.weights.json"
    file.write_text(json.dumps({"weight_map": {"/a/vars": []}}))
    with pytest.raises(FormatError, match="'/a/vars': expected the plain name of a file"):
        CheckpointIndex.read(file)
