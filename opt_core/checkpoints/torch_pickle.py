# SPDX-License-Identifier: Apache-2.0
"""What a state dict's pickle says, without running it and without torch.

A pickle is a program. This is a machine of our own for the few instructions and the few names that
`torch.save` of a state dict uses; nothing that the file names is ever imported or called. Keys of
dictionaries must be strings and the memo is no list, so that a small file cannot ask for much
memory or time either.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from opt_core.errors import FormatError

MAX_PICKLE = 2**24
"""Bytes: room for some sixty thousand tensors."""

_MAX_OPCODES = 2_000_000
MAX_NAME = 1024
"""Characters: two bytes of a pickle repeat an argument, so what costs time must be short."""

_MAX_DIMS = 32
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}

_STORAGES: dict[str, np.dtype[Any]] = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Storage:
    """A run of `numel` elements that the file holds under `key`."""

    key: str
    dtype: np.dtype[Any]
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A view onto a storage; offset and strides count elements, as torch does.

    `marks` names what else torch does to the values of the storage: flip their signs ("neg"), ...
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unpickled:
    """The value of a pickle, and every storage that it mentions, by key."""

    value: Any
    storages: dict[str, Storage]


@dataclass(frozen=True)
class Global:
    """A name that the file asks for and that stands on the list."""

    name: str


def load_pickle(stream: io.BytesIO, where: str) -> Unpickled:
    """Read the pickle at the position of `stream`, which then stands behind it.

    `where` names the file in messages. Raises FormatError for a damaged pickle and for any
    instruction or name that no state dict needs.
    """
    return run_pickle(Machine(where), stream)


def run_pickle(machine: Machine, stream: io.BytesIO) -> Unpickled:
    """Let a machine follow the pickle at the position of `stream`; errors as in `load_pickle`."""
    try:
        return Unpickled(machine.run(stream), machine.storages)
    except FormatError:
        raise
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{machine.where}: expected a pickled state dict, found a broken pickle ({error}). The "
            "file is damaged or its download incomplete: fetch it again."
        ) from error


class Machine:
    """A stack, the marks on it, the memo, and the storages met so far."""

    literals: ClassVar[frozenset[str]]
    instructions: ClassVar[Mapping[str, Callable[[Any, Any], None]]]

    def __init__(self, where: str) -> None:
        self.storages: dict[str, Storage] = {}
        self.where = where
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: io.BytesIO) -> Any:
        """Follow the instructions up to STOP."""
        for _ in range(_MAX_OPCODES):
            opcode = _OPCODES.get(stream.read(1))
            if opcode is None:
                raise ValueError(f"no instruction before byte {stream.tell()}")
            if opcode.name == "STOP":
                return self._pop()
            if opcode.name not in self.literals and opcode.name not in self.instructions:
                raise self._refuse(f"the pickle instruction {opcode.name}")
            argument = _read_argument(opcode, stream)
            if opcode.name in self.literals:
                self._stack.append(argument)
            else:
                self.instructions[opcode.name](self, argument)
        raise self._refuse(f"more than {_MAX_OPCODES} instructions")

    def _refuse(self, what: str) -> FormatError:
        return FormatError(
            f"{self.where}: expected a state dict of tensors, found {what}, which no state dict "
            "needs. The file was not executed. If you trust its origin, load it where it was made "
            "and save model.state_dict()."
        )

    def _pop(self) -> Any:
        if self._marks and self._marks[-1] == len(self._stack):
            raise ValueError("the stack is empty")
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self, length: int) -> None:
        items = [self._pop() for _ in range(length)]
        self._stack.append(tuple(reversed(items)))

    def _update(self, pairs: list[Any]) -> None:
        self._set_items(self._stack[-1], pairs)

    def _set_items(self, target: Any, pairs: list[Any]) -> None:
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("items are put into something that is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            name = self._key(key)
            if len(name) > MAX_NAME:
                raise self._refuse(f"a name of {len(name)} characters")
            name.encode()  # half a surrogate pair is no text: UnicodeEncodeError, a ValueError
            target[name] = value

    def _key(self, key: Any) -> str:
        if not isinstance(key, str):
            raise self._refuse(f"a {type(key).__name__} as the name of an entry")
        return key

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise TypeError("items are appended to something that is no list")
        self._stack[-1].extend(items)

    def _put(self, slot: int) -> None:
        self._memo[slot] = self._stack[-1]

    def _get(self, slot: int) -> None:
        self._stack.append(self._memo[slot])

    def _global(self, spelling: str) -> None:
        self._stack.append(self._find(spelling.replace(" ", ".")))

    def _find(self, name: str) -> Global:
        if name not in _STORAGES and name not in CALLS:
            raise self._refuse(f"a request for {name[:200]!r}")
        return Global(name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a global is not named by strings")
        if len(name) + len(module) > MAX_NAME:
            raise self._refuse(f"a request for a name of {len(name) + len(module)} characters")
        self._global(f"{module} {name}")

    def _reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise self._refuse("a call of something that is no function")
        self._stack.append(self._call(function.name, arguments))

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name not in CALLS:
            raise self._refuse("a call of something that is no function")
        return CALLS[name](arguments)

    def _build(self, _: Any) -> None:
        state = self._pop()
        self._set_state(self._stack[-1], state)

    def _set_state(self, target: Any, state: Any) -> None:
        """Drop the state that an OrderedDict carries (`_metadata`): it holds no tensors."""
        if not isinstance(target, dict):
            raise self._refuse("attributes set on something that is no dictionary")

    def _storage(self, _: Any) -> None:
        match self._pop():
            case (
                "storage",
                Global(name),
                str() as key,
                str(),
                int() as numel,
                *views,
            ) if name in _STORAGES and numel >= 0 and views in ([], [None]):
                storage = Storage(key, _STORAGES[name], numel)
                if self.storages.setdefault(key, storage) != storage:
                    raise self._refuse(f"two descriptions of storage {key[:50]!r}")
                self._stack.append(storage)
            case _:
                raise self._refuse("a storage described in an unknown way")


def _read_argument(opcode: pickletools.OpcodeInfo, stream: io.BytesIO) -> Any:
    """Return what stands behind an instruction; module and name of a GLOBAL with a space between.

    These two are lines, in which pickletools would interpret backslashes, and pickle does not.
    """
    if opcode.name == "GLOBAL":
        lines = [stream.readline(MAX_NAME) for _ in range(2)]
        if not all(line.endswith(b"\n") for line in lines):
            raise ValueError("a global is not named by two lines")
        return " ".join(line[:-1].decode() for line in lines)
    return opcode.arg.reader(stream) if opcode.arg else None


def _rebuild_tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    """Return the tensor that `torch._utils._rebuild_tensor_v2` makes of these arguments.

    Of its flags only those that are set count.
    """
    match arguments:
        case (
            Storage() as storage,
            int() as offset,
            tuple() as shape,
            tuple() as strides,
            bool(),  # requires_grad
            None | {} as hooks,
            *metadata,
        ) if not hooks and len(shape) == len(strides) <= _MAX_DIMS:
            if all(type(number) is int for number in (offset, *shape, *strides)):
                return StoredTensor(storage, offset, shape, strides, _marks(metadata))
    raise ValueError("a tensor is described in an unknown way")


def _marks(metadata: list[Any]) -> tuple[str, ...]:
    """Return the flags that are set in what may follow: nothing, None, or a dictionary of flags."""
    match metadata:
        case [] | [None]:
            return ()
        case [dict(flags)]:
            return tuple(name for name, value in flags.items() if value is not False)
    raise ValueError("a tensor is described in an unknown way")


def _rebuild_parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    match arguments:
        case (StoredTensor() as tensor, bool(), None | {} as hooks) if not hooks:
            return tensor
    raise ValueError("a parameter is described in an unknown way")


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments:
        raise ValueError("a dictionary is made in an unknown way")
    return {}


CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}

LITERALS = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
)

INSTRUCTIONS: dict[str, Callable[[Any, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "NONE": lambda machine, _: machine._stack.append(None),
    "NEWTRUE": lambda machine, _: machine._stack.append(True),
    "NEWFALSE": lambda machine, _: machine._stack.append(False),
    "EMPTY_DICT": lambda machine, _: machine._stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine._stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine._stack.append(()),
    "MARK": Machine._mark,
    "TUPLE": lambda machine, _: machine._stack.append(tuple(machine._pop_mark())),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "SETITEM": Machine._set_item,
    "SETITEMS": lambda machine, _: machine._update(machine._pop_mark()),
    "APPEND": lambda machine, _: machine._extend([machine._pop()]),
    "APPENDS": lambda machine, _: machine._extend(machine._pop_mark()),
    "BINPUT": Machine._put,
    "LONG_BINPUT": Machine._put,
    "MEMOIZE": lambda machine, _: machine._put(len(machine._memo)),
    "BINGET": Machine._get,
    "LONG_BINGET": Machine._get,
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "BUILD": Machine._build,
    "BINPERSID": Machine._storage,
}

Machine.literals = LITERALS
Machine.instructions = INSTRUCTIONS
