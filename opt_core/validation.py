# SPDX-License-Identifier: Apache-2.0
"""Checks of single option values: `check(name, value)` raises ConfigError, or lets the value pass."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable

from opt_core.errors import ConfigError

Check = Callable[[str, object], None]


def _check(valid: Callable[[object], bool], expected: str) -> Check:
    def check(name: str, value: object) -> None:
        if not valid(value):
            raise ConfigError(f"{name}: expected {expected}, found {value!r}.")

    return check


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _lies(value: object, low: float, high: float) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and low <= value <= high  # type: ignore[operator]


def optional(check: Check) -> Check:
    """The check, for a value that may also be None."""
    return lambda name, value: None if value is None else check(name, value)


def whole(minimum: int, maximum: float = math.inf) -> Check:
    """A whole number from `minimum` on, up to `maximum`."""
    end = "on" if maximum == math.inf else f"to {maximum}"
    return _check(
        lambda value: _is_whole(value) and _lies(value, minimum, maximum),
        f"a whole number from {minimum} {end}",
    )


def one_of(names: tuple[str, ...], what: str) -> Check:
    """One of the names; `what` says of which kind they are."""

    def check(name: str, value: object) -> None:
        if value not in names:
            raise ConfigError(f"{name}: unknown {what} {value!r}. Known: {', '.join(names)}.")

    return check


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like an unknown one, if any is."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    found = nearest(name, known)
    return f" Did you mean {found!r}?" if found else ""


number = _check(
    lambda value: _lies(value, -math.inf, math.inf) and abs(value) != math.inf,  # type: ignore[arg-type]
    "a finite number",
)
flag = _check(lambda value: isinstance(value, bool), "True or False")
probability = _check(lambda value: _lies(value, 0, 1), "a number from 0 to 1")
non_negative = _check(
    lambda value: _lies(value, 0, math.inf) and value != math.inf, "a number from 0 on"
)
positive = _check(
    lambda value: _lies(value, 0, math.inf) and value not in (0, math.inf), "a number above 0"
)
token_id = optional(_check(_is_whole, "a token id or None"))


def token_ids(name: str, value: object) -> None:
    """A token id, several of them, or None."""
    for token in value if isinstance(value, list | tuple) else (value,):
        token_id(name, token)
