# SPDX-License-Identifier: Apache-2.0
"""The container of Flax (`flax_model.msgpack`): nested maps with arrays at their ends.

An array is a msgpack extension of type 1 that holds, packed once more, its shape, the name of its
dtype and its bytes. A large one is a map in its place: its shape, and parts of its flat values.
Here the keys on the way to an array are its name, joined with dots: `model.decoder.layers.0...`.

Only the structure is read when a file is opened; the values are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator

from opt_core.checkpoints import safetensors_format
from opt_core.checkpoints.joined import JoinedTensor
from opt_core.checkpoints.msgpack_wire import Cursor, Kind, peek
from opt_core.checkpoints.sources import FileSource
from opt_core.checkpoints.tensors import LazyTensor, TensorInfo
from opt_core.errors import FormatError

DTYPES = {dtype.name: dtype for dtype in safetensors_format.DTYPES.values()}
ARRAY, SCALAR = 1, 3  # types of extensions; an array and a numpy scalar look alike
CHUNKED = "__msgpack_chunked_array__"
SEPARATOR = "."

MAX_DEPTH = 64  # maps within maps
MAX_NAME = 1000  # characters
_MAX_DIMS = 32
_MAX_VALUES = 30_000  # the largest OPT has 1540 arrays in some 4000 maps and parts

_Node = LazyTensor | int | None | dict[str, "_Node"]


def matches(start: bytes) -> bool:
    """Tell from the first bytes of a file whether it is a map whose first key is a string."""
    kind, rest = peek(start)
    return kind is Kind.MAP and peek(rest)[0] is Kind.TEXT


def read_msgpack(source: FileSource) -> tuple[list[LazyTensor], dict[str, str]]:
    """Return the tensors of a file in the order of their bytes, and no metadata: there is none.

    What is no array (numbers, strings) is left out. Raises FormatError if the file is damaged,
    contradicts itself, or holds what Flax does not write.
    """
    tensors = list(_tensors(_Parser(source).run()))
    if not tensors:
        raise FormatError(
            f"{source.path}: expected names and arrays, found no array. Is this a checkpoint?"
        )
    return tensors, {}


def _tensors(node: _Node) -> Iterator[LazyTensor]:
    if isinstance(node, LazyTensor):
        yield node
    elif isinstance(node, dict):
        for child in node.values():
            yield from _tensors(child)


class _Parser:
    """Follows the maps of a file, which may lie at most so deep and be so many."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        self._cursor = Cursor(source)
        self._values = 0

    def run(self) -> _Node:
        """Read the one map that a file is."""
        tree = self._map(self._cursor.expect(Kind.MAP), ())
        if self._cursor.position != self._source.size:
            raise self._cursor.refuse("the end of the file", "more bytes")
        if not isinstance(tree, dict):
            raise self._cursor.refuse("names and arrays", "one array without a name")
        return tree

    def _map(self, count: int, path: tuple[str, ...]) -> _Node:
        if len(path) >= MAX_DEPTH:
            raise self._cursor.refuse(f"maps at most {MAX_DEPTH} deep", "a deeper one")
        node: dict[str, _Node] = {}
        for _ in range(count):
            self._values += 1
            if self._values > _MAX_VALUES:
                raise self._cursor.refuse(f"at most {_MAX_VALUES} values", "more")
            key = self._key()
            if key in node:
                raise self._cursor.refuse("keys that differ", f"{key!r} twice")
            node[key] = self._value((*path, key))
        return self._join(node, path) if CHUNKED in node else node

    def _key(self) -> str:
        length = self._cursor.expect(Kind.TEXT)
        if length > 4 * MAX_NAME:
            raise self._cursor.refuse(f"a key of at most {4 * MAX_NAME} bytes", f"{length}")
        data = self._cursor.take(length)
        try:
            key = data.decode()
        except UnicodeDecodeError as error:
            raise self._cursor.refuse("a key in UTF-8", f"{data[:50]!r}") from error
        if SEPARATOR in key:
            raise self._cursor.refuse(f"keys without {SEPARATOR!r}", f"{key[:200]!r}")
        return key

    def _value(self, path: tuple[str, ...]) -> _Node:
        kind, number = self._cursor.head()
        match kind:
            case Kind.MAP:
                return self._map(number, path)
            case Kind.EXT:
                return self._extension(number, path)
            case Kind.UINT:
                return number
            case Kind.LIST:
                raise self._cursor.refuse("maps and arrays, to which Flax turns lists", "a list")
        self._cursor.skip(number)
        return None

    def _extension(self, length: int, path: tuple[str, ...]) -> LazyTensor | None:
        (kind,) = self._cursor.take(1)
        if kind not in (ARRAY, SCALAR):
            self._cursor.skip(length)
            return None
        return self._array(self._name(path), self._cursor.position + length)

    def _name(self, path: tuple[str, ...]) -> str:
        name = SEPARATOR.join(path)
        if len(name) > MAX_NAME:
            raise self._cursor.refuse(f"a name of at most {MAX_NAME} characters", f"{len(name)}")
        return name

    def _array(self, name: str, end: int) -> LazyTensor:
        """Read shape and dtype of an array whose bytes end at `end`, and pass over its values."""
        cursor = self._cursor
        where = f"tensor {name!r}: "
        items = cursor.expect(Kind.LIST)
        dims = cursor.expect(Kind.LIST) if items == 3 else _MAX_DIMS + 1
        if dims > _MAX_DIMS:
            raise cursor.refuse(f"{where}a shape, a dtype and bytes", "something else")
        shape = tuple(cursor.expect(Kind.UINT) for _ in range(dims))
        spelling = cursor.take(min(cursor.expect(Kind.TEXT, Kind.BYTES), MAX_NAME))
        dtype = DTYPES.get(spelling.decode("ascii", "replace"))
        if dtype is None:
            raise cursor.refuse(f"{where}a dtype of {', '.join(DTYPES)}", f"{spelling[:50]!r}")
        info = TensorInfo(name, dtype, shape, self._source.path)
        length = cursor.expect(Kind.BYTES, Kind.TEXT)
        offset = cursor.position
        if length != info.nbytes or offset + length != end:
            raise cursor.refuse(
                f"{where}{info.nbytes} bytes for {dtype} {shape}, {end - offset} by the length "
                "around them",
                f"{length}",
            )
        cursor.skip(length)
        return LazyTensor(info, self._source, offset)

    def _join(self, node: dict[str, _Node], path: tuple[str, ...]) -> LazyTensor:
        """Make one tensor of an array in parts."""
        name = self._name(path)
        lengths = self._numbered(node.get("shape"), name)
        chunks = self._numbered(node.get("chunks"), name)
        shape = tuple(length for length in lengths if isinstance(length, int))
        parts = [chunk for chunk in chunks if isinstance(chunk, LazyTensor)]
        if len(node) != 3 or len(shape) < len(lengths) or not parts or len(parts) < len(chunks):
            raise self._cursor.refuse(f"tensor {name!r}: a shape and flat parts", "something else")
        info = TensorInfo(name, parts[0].dtype, shape, self._source.path)
        return JoinedTensor(info, parts, None)

    def _numbered(self, node: _Node, name: str) -> list[_Node]:
        """Return the values of a map whose keys are "0", "1", ..."""
        numbers = [str(number) for number in range(len(node))] if isinstance(node, dict) else []
        if not isinstance(node, dict) or node.keys() != set(numbers):
            raise self._cursor.refuse(f"tensor {name!r}: a map of 0, 1, ...", "another value")
        return [node[number] for number in numbers]
