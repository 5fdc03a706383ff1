# SPDX-License-Identifier: Apache-2.0
"""What fuzzing has found, each with its story: all of it ends in one of our errors by now."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import zstandard

from opt_core.checkpoints.checksums import crc32c
from opt_core.checkpoints.orbax_format import read_orbax
from opt_core.config import CONFIG_NAME
from opt_core.errors import FormatError
from tests.core.metaseq_files import save_program
from tests.fuzz.folder_seeds import orbax_folders
from tests.fuzz.inputs import placed, scratch
from tests.fuzz.limits import limited
from tests.fuzz.seeds import Seed
from tests.fuzz.targets import READ, examine


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    with scratch() as folder:
        yield folder


def outcome(folder: Path, reader: str, files: dict[str, bytes], entry: str = "") -> str:
    with placed(folder, Seed("finding", reader, files, entry), files) as path:
        return examine(reader, path)


# --- configurations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"vocab_size": ' + "9" * 5000 + "}",  # ValueError: too many digits for Python
        '{"x": ' + "[" * 100_000 + "}",  # RecursionError
        '{"num_labels": "3"}',  # TypeError
        '{"num_labels": 9223372036854775807}',  # MemoryError: a name for each
        '{"num_hidden_layers": 2147483647}',  # endless: a row of the parameter table for each
        '{"id2label": ["a", "b"]}',  # AttributeError
        '{"id2label": {"first": "a"}}',  # ValueError
        '{"id2label": {"0": ["a"]}}',  # TypeError: a list as the key of label2id
        '{"label2id": [0]}',  # TypeError when it was written
        '{"architectures": 1}',  # TypeError
    ],
)
def test_configurations(text: str, memory: Path) -> None:
    assert outcome(memory, "config", {CONFIG_NAME: text.encode()}, CONFIG_NAME) == "ConfigError"


@pytest.mark.parametrize("text", ['{"self": 1}', '{"cls": 1}', '{"values": 1}', '{"dtype": ""}'])
def test_entries_of_any_name(text: str, memory: Path) -> None:
    """`self` was a TypeError; an empty dtype was not the same when it was read again."""
    assert outcome(memory, "config", {CONFIG_NAME: text.encode()}, CONFIG_NAME) == READ


def test_names_that_no_file_can_have(memory: Path) -> None:
    """OSError: File name too long."""
    for name in ("x" * 256, "\u20ac" * 100):
        index = {"weight_map": {"a": name}}
        files = {"i.json": json.dumps(index).encode()}
        assert outcome(memory, "index", files, "i.json") == "FormatError"


# --- pickles ------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\1tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def pickled(memory: Path, reader: str, program: bytes) -> str:
    """Read a file of torch with a pickle around `program` and one storage of one element."""
    save_program(memory / "file", b"\x80\x02" + program + b".", [np.ones(1, np.float32)])
    try:
        return examine(reader, memory / "file")
    finally:
        (memory / "file").unlink()


@pytest.mark.parametrize("reader", ["torch-zip", "torch-objects"])
@pytest.mark.parametrize("program", [b"c\\q\nx\n", b"S'\\q'\n"])
def test_backslashes(reader: str, program: bytes, memory: Path) -> None:
    """pickletools interpreted escapes, with a DeprecationWarning, before anything was refused."""
    assert pickled(memory, reader, program) == "FormatError"


def test_integers_too_long_to_print(memory: Path) -> None:
    """ValueError from the error message itself."""
    long = b"\x8b" + struct.pack("<I", 3000) + b"\x7f" * 3000
    tensor = REBUILD + b"(" + STORAGE + b"K\0" + long + b"\x85K\1\x85tR"
    program = b"}(" + text("a") + tensor + b"u"
    assert pickled(memory, "torch-objects", program) == "FormatError"


@pytest.mark.parametrize(
    "program",
    [
        # Each names something long in a few bytes of the memo, again and again.
        b"}(" + text("x" * 200_000) + b"q\1N" + b"h\1N" * 50_000 + b"u",
        b"}(B" + struct.pack("<I", 100_000) + bytes(100_000) + b"q\1N" + b"h\1N" * 50_000 + b"u",
        b"](" + text("metaseq") + b"q\1" + text("x" * 100_000) + b"q\2\x93" + b"h\1h\2\x93" * 9000
        + b"e",
        b"](" + REBUILD + b"q\1" + STORAGE + b"q\2(" + b"K\1" * 50_000 + b"tq\3"
        + b"h\1(h\2K\0h\3h\3tR" * 9000 + b"e",
    ],
    ids=["key", "bytes", "global", "shape"],
)  # fmt: skip
def test_small_pickles_that_took_long(program: bytes, memory: Path) -> None:
    """Some hundred kilobytes that took minutes, or gigabytes; found while reading, not by chance."""
    assert pickled(memory, "torch-objects", program) == "FormatError"


# --- safetensors --------------------------------------------------------------------------------


def test_half_a_character(memory: Path) -> None:
    """The safetensors library refuses it; here it passed, and could not be printed."""
    header = b'{"__metadata__": {"format": "\\ud800"}}'
    files = {"file": len(header).to_bytes(8, "little") + header}
    assert outcome(memory, "safetensors", files, "file") == "FormatError"


# --- orbax --------------------------------------------------------------------------------------


def numbers(values: Sequence[int]) -> bytes:
    """Seven bits a byte, lowest first."""
    out = bytearray()
    for value in values:
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


def framed(magic: int, body: bytes) -> bytes:
    data = struct.pack(">IQ", magic, 0)[:4] + struct.pack("<Q", len(body) + 18) + b"\0\0" + body
    return data + struct.pack("<I", crc32c(data))


def test_a_node_named_again_and_again(memory: Path) -> None:
    """A tree that leads to one empty leaf 60,000 times: minutes, if the leaf was compressed."""
    table, count = numbers([1, 1, 0]) + b"d", 60_000
    leaf = framed(0x0CDB20DE, b"\0" + table + b"\0")
    body = io.BytesIO()
    body.write(b"\1" + table + numbers([count, *[0] * (count - 1), *[5] * count, *[0] * count]))
    body.write(b"".join(b"%05d" % number for number in range(count)))
    body.write(numbers([*[0] * 2 * count, *[len(leaf)] * count, *[0] * 3 * count]))
    node = framed(0x0CDB20DE, body.getvalue())
    place = numbers([1, 1]) + b"\1" + numbers([0, len(leaf), len(node), 0, 0, 0])
    start = bytes(17) + numbers([9, 9]) + b"\4\0"
    manifest = framed(0x0CDB3A2A, start + table + place)
    (_, own), *_ = orbax_folders({})
    files = {"_METADATA": own["orbax/_METADATA"], "manifest.ocdbt": manifest, "d": leaf + node}
    nodes = pytest.raises(FormatError, match="at most 1000 nodes")
    with placed(memory, Seed("nodes", "orbax", files), files) as path, limited(), nodes:
        read_orbax(path)


def sharded_bytes(count: int) -> dict[str, bytes]:
    """An array of so many bytes, each a compressed chunk of one shard."""
    frame = zstandard.compress(b"\1")
    pairs = [struct.pack("<QQ", number * len(frame), len(frame)) for number in range(count)]
    index = b"".join(pairs)
    sharding = {
        "chunk_shape": [1],
        "codecs": [{"name": "bytes"}, {"name": "zstd"}],
        "index_codecs": [{"name": "bytes"}, {"name": "crc32c"}],
    }
    array = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [count],
        "data_type": "uint8",
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [count]}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    entry = {"key_metadata": [{"key": "a"}], "value_metadata": {"value_type": "jax.Array"}}
    return {
        "_METADATA": json.dumps({"tree_metadata": {"a": entry}}).encode(),
        "a/zarr.json": json.dumps(array).encode(),
        "a/c/0": frame * count + index + struct.pack("<I", crc32c(index)),
    }


def test_chunks_of_one_byte(memory: Path) -> None:
    """8000 compressed chunks in 200 kB, each with a decoder of its own: it took over two seconds."""
    assert outcome(memory, "orbax", dict(sharded_bytes(100))) == READ
    assert outcome(memory, "orbax", dict(sharded_bytes(8000))) == "FormatError"


@pytest.mark.parametrize("codecs", [[], [{"name": "sharding_indexed", "configuration": "x"}]])
def test_codecs_that_are_none(codecs: object, memory: Path) -> None:
    """IndexError where the list was empty, AttributeError where a text stood for a dictionary."""
    files = dict(sharded_bytes(2))
    content = json.loads(files["a/zarr.json"])
    content["codecs"] = codecs
    files["a/zarr.json"] = json.dumps(content).encode()
    assert outcome(memory, "orbax", files) == "FormatError"
