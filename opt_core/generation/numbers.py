# SPDX-License-Identifier: Apache-2.0
"""Fields that a compiled loop is told when it runs, so that other values compile nothing.

A number, or tuples of numbers: how many there are is part of what is compiled, and so is a None.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

#: The metadata of such a field.
NUMBER = {"is_number": True}

T = TypeVar("T")


def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind) if field.metadata == NUMBER)


def numbers_in(instance: Any) -> Iterator[Any]:
    """All numbers in the fields of a dataclass that are marked so."""
    for name in _names(type(instance)):
        yield from _flat(getattr(instance, name))


def with_numbers_in(instance: T, given: Iterator[Any]) -> T:
    """A copy with others in their places, or with arrays inside a compiled loop."""
    names = _names(type(instance))
    if not names:
        return instance
    return replace(instance, **{x: _filled(getattr(instance, x), given) for x in names})  # type: ignore[type-var]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for part in value:
            yield from _flat(part)
    elif value is not None:
        yield value


def _filled(value: Any, given: Iterator[Any]) -> Any:
    if isinstance(value, tuple):
        return tuple(_filled(part, given) for part in value)
    return None if value is None else next(given)
