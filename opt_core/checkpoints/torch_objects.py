# SPDX-License-Identifier: Apache-2.0
"""Pickles of training runs: a state dict among settings and counters, none of which is brought to life.

metaseq saves its configuration (argparse, OmegaConf), meters and optimizer beside the tensors. Names
on a closed list become inert records here: never imported, never called, only remembered. Any other
name is refused as in a plain state dict. Nothing here walks through what the file built: a value
may contain itself, or a list that doubles thirty times.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from opt_core.checkpoints.torch_pickle import (
    CALLS,
    INSTRUCTIONS,
    LITERALS,
    MAX_NAME,
    Global,
    Machine,
    Unpickled,
    run_pickle,
)


class Inert:
    """What the file says of an object that is not made: its class, arguments and state."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: Any = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None

    def __repr__(self) -> str:
        return f"Inert({self.name!r})"


def load_objects(stream: io.BytesIO, where: str) -> Unpickled:
    """Read the pickle of a training run as `load_pickle` reads that of a state dict.

    Keys of dictionaries that are no strings (numbers, mostly) are spelt as strings. Raises
    FormatError for a damaged pickle and for any name that is not on the list.
    """
    return run_pickle(_ObjectMachine(where), stream)


class _ObjectMachine(Machine):
    """The machine for state dicts, with inert objects, sets and bytes besides."""

    literals = LITERALS | frozenset(
        (
            "BINBYTES",
            "BINBYTES8",
            "BINSTRING",
            "BINUNICODE8",
            "SHORT_BINBYTES",
            "SHORT_BINSTRING",
        )
    )

    def _key(self, key: Any) -> str:
        """Spell a key: strings hash in an order that no file can foresee, numbers do not."""
        if isinstance(key, (bool, int, float)) or key is None:
            return repr(key)
        if isinstance(key, bytes):
            return repr(key[: MAX_NAME + 1])  # longer than any name may be: refused
        if isinstance(key, (Global, Inert)):
            return key.name
        return super()._key(key)

    def _find(self, name: str) -> Global:
        if name in _NAMES or name.startswith(_PREFIXES):
            return Global(name)
        return super()._find(name)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in CALLS:
            return CALLS[name](arguments)
        if name in _OBJECT_CALLS:
            return _OBJECT_CALLS[name](arguments)
        return Inert(name, arguments)

    def _set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, Inert):
            target.state = state
        else:
            super()._set_state(target, state)

    def _set_items(self, target: Any, pairs: list[Any]) -> None:
        if not isinstance(target, Inert):
            super()._set_items(target, pairs)

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], Inert):
            super()._extend(items)

    def _new_object(self, _: Any) -> None:
        arguments, kind = self._pop(), self._pop()
        if not isinstance(kind, Global):
            raise self._refuse("an object of something that is no class")
        self._stack.append(self._call(kind.name, arguments))

    def _new_object_by_keywords(self, _: Any) -> None:
        self._pop()
        self._new_object(None)

    def _frozen_set(self, _: Any) -> None:
        self._stack.append(Inert("builtins.frozenset", self._pop_mark()))

    instructions = INSTRUCTIONS | {
        "NEWOBJ": _new_object,
        "NEWOBJ_EX": _new_object_by_keywords,
        "EMPTY_SET": lambda machine, _: machine._stack.append(Inert("builtins.set")),
        "ADDITEMS": lambda machine, _: machine._extend(machine._pop_mark()),
        "FROZENSET": _frozen_set,
    }


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    match arguments:
        case (tuple() as lengths,):
            return lengths
    raise ValueError("a torch.Size is made in an unknown way")


_OBJECT_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch.Size": _size,
    "collections.defaultdict": lambda arguments: {},
}

_PREFIXES = (
    "argparse.",
    "datetime.",
    "enum.",
    "fairscale.",
    "fairseq.",
    "megatron.",
    "metaseq.",
    "omegaconf.",
    "pathlib.",
    "typing.",
)

_TYPES = "bool bytearray bytes complex dict float frozenset int list long object set str tuple type unicode"
_DTYPES = "bfloat16 bool float16 float32 float64 int16 int32 int64 int8 uint8"

_NAMES = frozenset(
    (
        "_codecs.encode",
        "collections.Counter",
        "collections.defaultdict",
        "copyreg._reconstructor",
        "copy_reg._reconstructor",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "operator.getitem",  # how typing pickles Optional[int]
        "_operator.getitem",
        "torch.Size",
        "torch.device",
        *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _TYPES.split()),
        *(f"torch.{name}" for name in _DTYPES.split()),
    )
)
