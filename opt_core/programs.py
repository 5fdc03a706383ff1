# SPDX-License-Identifier: Apache-2.0
"""Compiled programs: which of them a process keeps.

A program of XLA takes megabytes, and on Linux some 250 memory maps, of which a process may have 65,530
(`vm.max_map_count`); without more, it dies. So no more than a number of programs are kept, the latest used
ones of all models together. `generate` compiles the others again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from itertools import count
from typing import Any, ClassVar
from weakref import WeakSet

from opt_core.errors import InputError

#: Programs kept at most, unless `set_program_limit` says otherwise.
DEFAULT_LIMIT = 64


class Programs:
    """The compiled programs of one owner, by what each was compiled for. They are freed with it."""

    limit: ClassVar[int] = DEFAULT_LIMIT  # of all owners together

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}
        with _LOCK:
            _OWNERS.add(self)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The program of that key, made where there is none."""
        entry = self._entries.get(key)
        if entry is None:
            with _LOCK:
                entry = self._entries.setdefault(key, _Entry(make()))
                entry.last_use = next(_CLOCK)
                _free_oldest()
        entry.last_use = next(_CLOCK)
        return entry.program

    def clear(self) -> None:
        """Frees all of them."""
        with _LOCK:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Any]:
        return iter([entry.program for entry in self._entries.values()])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # copies of a model compile their own


class _Entry:
    """A program, and when it was last asked for."""

    __slots__ = ("last_use", "program")

    def __init__(self, program: Any) -> None:
        self.program, self.last_use = program, 0


_LOCK = threading.RLock()
_OWNERS: WeakSet[Programs] = WeakSet()
_CLOCK = count(1)


def program_limit() -> int:
    """How many compiled programs this process keeps at most."""
    return Programs.limit


def set_program_limit(limit: int) -> None:
    """Keeps at most so many compiled programs, of all models together; frees those beyond it.

    Raises:
        InputError: no whole number of at least 1.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise InputError(
            f"set_program_limit: expected a whole number of at least 1, found {limit!r}."
        )
    with _LOCK:
        Programs.limit = limit
        _free_oldest()


def count_programs() -> int:
    """How many compiled programs this process keeps now."""
    with _LOCK:
        return sum(map(len, _OWNERS))


def clear_compiled() -> None:
    """Frees all compiled programs of this process; `model.clear_compiled()` frees those of one model."""
    with _LOCK:
        owners = [*_OWNERS]
    for owner in owners:
        owner.clear()


def _free_oldest() -> None:
    """Frees the programs that were not used for longest, as many as are beyond the limit."""
    entries = [
        (entry.last_use, owner, key) for owner in _OWNERS for key, entry in owner._entries.items()
    ]
    entries.sort(key=lambda found: found[0])
    for _, owner, key in entries[: max(0, len(entries) - Programs.limit)]:
        del owner._entries[key]
