# SPDX-License-Identifier: Apache-2.0
"""`pytorch_model.bin` without torch: what torch wrote, and what nobody should have written.

The files in tests/golden/torch_bins were made by make_torch_bins.py there.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import same

from opt_core.checkpoints.reader import CheckpointReader
from opt_core.checkpoints.torch_pickle import load_pickle
from opt_core.errors import FormatError

BINS = Path(__file__).parents[1] / "golden" / "torch_bins"
FILES = sorted(BINS.glob("*.bin"))


def expected(file: Path) -> dict[str, NDArray[Any]]:
    """What torch said is in a file."""
    with np.load(file.with_suffix(".npz")) as arrays:
        return {
            name.removesuffix(":bfloat16"): arrays[name].view(ml_dtypes.bfloat16)
            if name.endswith(":bfloat16")
            else arrays[name]
            for name in arrays.files
        }


def test_the_fixtures_are_there() -> None:
    assert len(FILES) == 7


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_equal_to_what_torch_wrote(file: Path) -> None:
    wanted = expected(file)
    with CheckpointReader.open(file) as reader:
        assert reader.container == "torch"
        assert reader.metadata == {}
        assert list(reader) == list(wanted)
        for name, tensor in reader.items():
            assert same(tensor.read(), wanted[name])
            assert same(tensor.map(), wanted[name])
            array = tensor.read()
            assert array.flags.c_contiguous
            assert array.ctypes.data % 64 == 0 or not array.size
            if tensor.shape:
                half = tensor.shape[0] // 2
                assert same(tensor.read_slice(0, half, tensor.shape[0]), wanted[name][half:])


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_ties_and_views_share_memory_when_mapped(kind: str) -> None:
    with CheckpointReader.open(BINS / f"views_{kind}.bin") as reader:
        base = reader["base"].map()
        for name in ("tied", "transposed", "rows", "columns", "steps", "one_column"):
            assert np.shares_memory(base, reader[name].map()), name


# --- files that nobody should have written ------------------------------------------------------


class Global:
    """Pickles as the name of something, which need not exist here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Call:
    """Pickles as a call of a global."""

    def __init__(self, function: Global, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments


class Stored:
    """Pickles as a storage."""

    def __init__(self, key: Any, numel: Any, kind: str = "FloatStorage") -> None:
        self.description = ("storage", Global("torch", kind), key, "cpu", numel)


def pickled(value: Any) -> bytes:
    """Pickle by hand, in torch's protocol 2, whatever a hostile file may say."""
    match value:
        case Global(module=module, name=name):
            return f"c{module}\n{name}\n".encode()
        case Call(function=function, arguments=arguments):
            return pickled(function) + pickled(arguments) + b"R"
        case Stored(description=description):
            return pickled(description) + b"Q"
        case tuple():
            return b"(" + b"".join(map(pickled, value)) + b"t"
        case dict():
            return b"}(" + b"".join(pickled(k) + pickled(v) for k, v in value.items()) + b"u"
    return pickle.dumps(value, 2)[2:-1]


HOOKS = Call(Global("collections", "OrderedDict"))


def tensor(
    storage: Any,
    shape: tuple[Any, ...] = (4,),
    strides: tuple[Any, ...] = (1,),
    offset: Any = 0,
    rest: tuple[Any, ...] = (False, HOOKS),
) -> Call:
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, offset, shape, strides, *rest)


def marked(metadata: Any) -> Call:
    """A tensor with what torch keeps of a view besides its place."""
    return tensor(Stored("0", 4), rest=(False, HOOKS, metadata))


def zipped(
    state: Any, members: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED
) -> bytes:
    """Make a zip of a state dict (or of a pickle's bytes) and one storage "0" of four floats."""
    program = state if isinstance(state, bytes) else b"\x80\x02" + pickled(state) + b"."
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("m/data.pkl", program)
        for name, data in ({"data/0": bytes(16)} | (members or {})).items():
            archive.writestr(f"m/{name}", data)
    return stream.getvalue()


def legacy(state: Any) -> bytes:
    """Make a file as torch before 1.6 did, of a state dict and one storage "0" of four floats."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, state, ["0"])
    programs = (b"\x80\x02" + pickled(part) + b"." for part in parts)
    return b"".join(programs) + struct.pack("<q", 4) + bytes(16)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], dict[str, NDArray[Any]]]:
    def read_file(data: bytes) -> dict[str, NDArray[Any]]:
        path = tmp_path / "pytorch_model.bin"
        path.write_bytes(data)
        with CheckpointReader.open(path) as reader:
            return {name: lazy.read() for name, lazy in reader.items()}

    return read_file


def test_the_hand_made_file_is_good_but_for_what_is_done_to_it(read: Any) -> None:
    for made in (zipped, legacy):
        for good in (tensor(Stored("0", 4)), marked(None), marked({}), marked({"neg": False})):
            assert same(read(made({"w": good}))["w"], np.zeros(4, np.float32))


GOOD = Stored("0", 4)
HOSTILE = {
    "os.system": ({"w": Call(Global("os", "system"), "exit 1")}, "'os.system'.*not executed"),
    "posix.system": (Call(Global("posix", "system"), "exit 1"), "'posix.system'.*not executed"),
    "eval": ({"w": Call(Global("builtins", "eval"), "1/0")}, "'builtins.eval'.*not executed"),
    "argparse": ({"w": Global("argparse", "Namespace")}, "'argparse.Namespace'.*not executed"),
    "load_from_bytes": (
        {"w": Call(Global("torch.storage", "_load_from_bytes"), b"")},
        "'torch.storage._load_from_bytes'",
    ),
    "dotted name": ({"w": Global("collections", "OrderedDict.fromkeys")}, "OrderedDict.fromkeys'"),
    "calling a storage": ({"w": Call(Global("torch", "FloatStorage"))}, "a call of something"),
    "calling a tensor": ({"w": Call(GOOD)}, "a call of something"),  # type: ignore[arg-type]
    "int as a name": ({1: 2}, "a int as the name of an entry"),
    "nested": ({"model": {"w": tensor(GOOD)}}, r"no tensor under its 1 entries \['model'\]"),
    "list": ([1], "found a list. Save"),
    "empty": ({}, "no tensor under its 0 entries"),
    "no such storage": ({"w": tensor(Stored("7", 4))}, "'w': expected a storage '7', found none"),
    "key outside": ({"w": tensor(Stored("../data.pkl", 4))}, "found none"),
    "storage said larger": ({"w": tensor(Stored("0", 5))}, "storage of 5 float32, found 16 bytes"),
    "storage said huge": ({"w": tensor(Stored("0", 2**60))}, "found 16 bytes"),
    "storage of less than none": ({"w": tensor(Stored("0", -4))}, "a storage described"),
    "storage with a tuple as key": ({"w": tensor(Stored(("0",), 4))}, "a storage described"),
    "unknown storage": ({"w": tensor(Stored("0", 4, "OrderedDict"))}, "'torch.OrderedDict'"),
    "untyped storage": ({"w": Global("torch", "UntypedStorage")}, "'torch.UntypedStorage'"),
    "two types": (
        {"v": tensor(GOOD), "w": tensor(Stored("0", 4, "IntStorage"))},
        "two descriptions of storage '0'",
    ),
    "past the end": ({"w": tensor(GOOD, offset=1)}, "'w': expected a tensor within its storage"),
    "before the start": ({"w": tensor(GOOD, offset=-1)}, "within its storage"),
    "backward": ({"w": tensor(GOOD, strides=(-1,), offset=3)}, "within its storage"),
    "wide steps": ({"w": tensor(GOOD, strides=(2,))}, "within its storage"),
    "inflated": ({"w": tensor(GOOD, (2**30, 2**30), (0, 0))}, "within its storage"),
    "too many": ({"w": tensor(GOOD, (2**40, 2**40), (0, 0))}, "expected a shape"),
    "negative": ({"w": tensor(GOOD, (-1,))}, "expected a shape"),
    "floats": ({"w": tensor(GOOD, (4.0,))}, "a tensor is described in an unknown way"),
    "uneven": ({"w": tensor(GOOD, (2, 2))}, "a tensor is described in an unknown way"),
    "tensor of a string": ({"w": tensor("0")}, "a tensor is described in an unknown way"),
    "parameter of nothing": (
        {"w": Call(Global("torch._utils", "_rebuild_parameter"), 1, True)},
        "a parameter is described in an unknown way",
    ),
    "hooks": ({"w": tensor(GOOD, rest=(False, {"a": 1}))}, "described in an unknown way"),
    "hooks left out": ({"w": tensor(GOOD, rest=(False,))}, "described in an unknown way"),
    "flag that is none": ({"w": tensor(GOOD, rest=("", HOOKS))}, "described in an unknown way"),
    "metadata of another kind": ({"w": marked("neg")}, "described in an unknown way"),
    "more than torch writes": (
        {"w": tensor(GOOD, rest=(False, HOOKS, {}, {}))},
        "described in an unknown way",
    ),
    "parameter with hooks": (
        {"w": Call(Global("torch._utils", "_rebuild_parameter"), tensor(GOOD), True, {"a": 1})},
        "a parameter is described in an unknown way",
    ),
    "parameter with a state": (
        {
            "w": Call(
                Global("torch._utils", "_rebuild_parameter_with_state"), tensor(GOOD), True, HOOKS, {}
            )
        },
        "'torch._utils._rebuild_parameter_with_state'",
    ),
    "dictionary of something": (
        {"w": Call(Global("collections", "OrderedDict"), 1)},
        "a dictionary is made in an unknown way",
    ),
    "no end": (b"\x80\x02}", "broken pickle"),
    "empty stack": (b"\x80\x02.", "broken pickle"),
    "below the mark": (b"\x80\x02}(\x85.", "broken pickle"),
    "never stored": (b"\x80\x02h\x07.", "broken pickle"),
    "items of a number": (b"\x80\x02K\x01K\x01K\x01s.", "broken pickle"),
    "append to a dict": (b"\x80\x02}K\x01a.", "broken pickle"),
    "attributes of a list": (b"\x80\x02]}b.", "attributes set on"),
    "module by number": (b"\x80\x04K\x01K\x01\x93.", "broken pickle"),
    "os.system by protocol 4": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "'os.system'"),
    "instance": (b"\x80\x02(ios\nsystem\n.", "pickle instruction INST"),
    "new object": (b"\x80\x02\x81.", "pickle instruction NEWOBJ"),
    "extension": (b"\x80\x02\x82\x01.", "pickle instruction EXT1"),
    "out-of-band buffer": (b"\x80\x05\x97.", "pickle instruction NEXT_BUFFER"),
    "string beyond the end": (b"\x80\x02X\xff\xff\xff\x7fa.", "broken pickle"),
}  # fmt: skip


@pytest.mark.parametrize(("state", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_state_dict_is_refused(read: Any, state: Any, message: str) -> None:
    with pytest.raises(FormatError, match=f"(?s)pytorch_model.bin.*{message}"):
        read(zipped(state))


@pytest.mark.parametrize("made", [zipped, legacy])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("mark", ["neg", "conj", "what torch will think of"])
def test_marks_of_views_are_refused(
    read: Any, made: Callable[[Any], bytes], wrapped: bool, mark: str
) -> None:
    """torch computes other values than lie in the storage; once, signs were lost without a word."""
    view = marked({mark: True})
    if wrapped:
        view = Call(Global("torch._utils", "_rebuild_parameter"), view, False, HOOKS)
    with pytest.raises(FormatError, match=f"tensor 'w': expected plain values, .* '{mark}'"):
        read(made({"v": tensor(GOOD), "w": view}))


def test_nothing_that_a_file_names_is_called(read: Any, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "proof"),)

    pickle.loads(pickle.dumps(Attack()))
    (tmp_path / "proof").rmdir()  # the attack is a real one
    for protocol in range(6):
        for data in (pickle.dumps(Attack(), protocol), pickle.dumps({"w": Attack()}, protocol)):
            with pytest.raises(FormatError):
                read(zipped(data))
            if protocol >= 2:
                with pytest.raises(FormatError, match="not executed"):
                    read(data)
    assert not (tmp_path / "proof").exists()


def test_small_pickles_cannot_ask_for_much() -> None:
    """A memo slot of 2**31 makes Python's unpickler take 16 GB; twins of twins hash for ever."""
    slot = b"\x80\x02}r\xff\xff\xff\x7f."
    assert load_pickle(io.BytesIO(slot), "f").value == {}
    twins = b"\x80\x02)" + b"q\x00h\x00\x86" * 100
    with pytest.raises(FormatError, match="a tuple as the name of an entry"):
        load_pickle(io.BytesIO(b"\x80\x02}" + twins[2:] + b"Ns."), "f")
    with pytest.raises(FormatError, match="more than 2000000 instructions"):
        load_pickle(io.BytesIO(b"\x80\x02" + b"N" * 4_000_010 + b"."), "f")


SMALL = zipped({"w": tensor(GOOD)})
CENTRAL = SMALL.index(b"PK\x01\x02")


def patched(offset: int, data: bytes) -> bytes:
    """Overwrite bytes of the small file, counted from its first central directory entry."""
    start = CENTRAL + offset
    return SMALL[:start] + data + SMALL[start + len(data) :]


CONTAINERS = {
    "big-endian": (zipped({}, {"byteorder": b"big"}), "found big-endian ones"),
    "compressed": (
        zipped({"w": tensor(GOOD)}, method=zipfile.ZIP_DEFLATED),
        "member 'm/data.pkl': expected plain bytes",
    ),
    "encrypted": (patched(8, b"\x01"), "member 'm/data.pkl': expected plain bytes"),
    "truncated": (SMALL[:-30], "a whole zip archive.*fetch it again"),
    "cut in the middle": (SMALL[:80], "a whole zip archive"),
    "lying member": (patched(20, b"\xff\xff\xff\x7f" * 2), "'m/data.pkl': expected 2"),
    "member of two sizes": (patched(24, b"\x01\0\0\0"), "'m/data.pkl': expected 1 bytes"),
    "member elsewhere": (patched(42, b"\x01\0\0\0"), "'m/data.pkl': expected its header at 1"),
    "member beyond the file": (patched(42, b"\0\0\xff\x7f"), "'m/data.pkl': expected its header"),
    "some zip": (SMALL.replace(b"data.pkl", b"data.xml"), "with one data.pkl, found 0"),
    "pickle too large": (zipped(b"\x80\x02" + bytes(2**24)), "data.pkl of at most 16777216"),
    "a tar file": (bytes(257) + b"ustar" + bytes(250), "torch 0.4 or newer"),
    "another pickle": (pickle.dumps({"a": 1}, 2), "the magic number of torch.save"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), CONTAINERS.values(), ids=CONTAINERS)
def test_a_bad_archive_is_refused(read: Any, data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=f"(?s)pytorch_model.bin.*{message}"):
        read(data)


def test_a_member_that_stands_there_twice(read: Any) -> None:
    stream = io.BytesIO(SMALL)
    with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("m/data/0", bytes(16))
    with pytest.raises(FormatError, match="'m/data/0': expected it once, found it twice"):
        read(stream.getvalue())


def test_an_archive_beyond_4_gb(tmp_path: Path) -> None:
    """A sparse file: zip64 sizes and offsets, and a tensor that lies behind the first 4 GB."""
    path = tmp_path / "pytorch_model.bin"
    gap = 2**32 + 64
    with open(path, "wb") as file:
        program = b"\x80\x02" + pickled({"w": tensor(Stored("1", 4))}) + b"."
        members = [(b"m/data.pkl", program, len(program)), (b"m/data/0", b"", gap)]
        values = np.arange(4, dtype=np.float32).tobytes()
        places = []
        for name, data, size in [*members, (b"m/data/1", values, 16)]:
            places.append((name, file.tell(), size))
            extra = struct.pack("<HHQQ", 1, 16, size, size)
            sizes = (2**32 - 1, 2**32 - 1, len(name), len(extra))
            file.write(
                struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, *sizes) + name + extra
            )
            file.write(data)
            file.seek(size - len(data), 1)
        directory = file.tell()
        for name, offset, size in places:
            extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
            fields = (2**32 - 1, 2**32 - 1, len(name), len(extra), 0, 0, 0, 0, 2**32 - 1)
            file.write(struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, 0, *fields))
            file.write(name + extra)
        length, end = file.tell() - directory, file.tell()
        file.write(
            struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, length, directory)
            + struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
            + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
        )
    with CheckpointReader.open(path) as reader:
        assert same(reader["w"].read(), np.arange(4, dtype=np.float32))


def legacy_tail(data: bytes) -> int:
    """Where the storages of a legacy file begin."""
    stream = io.BytesIO(data)
    for _ in range(5):
        load_pickle(stream, "f")
    return stream.tell()


def test_a_legacy_file_that_lies(read: Any) -> None:
    data = (BINS / "dtypes_legacy.bin").read_bytes()
    tail = legacy_tail(data)
    sizes = struct.pack("<q", 6)
    assert data[tail : tail + 8] == sizes
    lies = {
        "expected a storage of 6": data[:-1],
        "found 7 elements": data[:tail] + struct.pack("<q", 7) + data[tail + 8 :],
        "found -1 elements": data[:tail] + struct.pack("<q", -1) + data[tail + 8 :],
        "found big-endian": data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        "protocol 1001": data.replace(b"M\xe9\x03.", b"M\xea\x03.", 1),
        "broken pickle": data[: tail - 10],
    }
    for message, lie in lies.items():
        assert lie != data
        with pytest.raises(FormatError, match=f"pytorch_model.bin.*{message}"):
            read(lie)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=3),
)
def test_flipped_bytes_are_read_or_refused(
    read: Any, file: Path, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(file.read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    try:
        found = read(bytes(data))
    except FormatError:
        return
    assert all(array.nbytes <= len(data) for array in found.values())


@given(
    st.lists(
        st.sampled_from(
            [bytes([code]) for code in b"\x80\x02}](N)\x85\x86tuse.0q\x00hRQb\x93K\x94"]
        )
    )
)
def test_random_programs_are_read_or_refused(program: list[bytes]) -> None:
    with suppress(FormatError):
        load_pickle(io.BytesIO(b"".join(program)), "f")
