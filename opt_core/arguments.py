# SPDX-License-Identifier: Apache-2.0
"""Refusals of arguments that a function does not have, or of values that it does not know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from opt_core.errors import InputError
from opt_core.validation import nearest


def one_of(what: str, value: Any, choices: Iterable[Any]) -> Any:
    """Return the value of the argument `what`; raise InputError if it is none of the choices."""
    if not isinstance(value, bool | str) or value not in choices:
        raise InputError(f"{what}={value!r}: expected one of {list(choices)}")
    return value


def refuse_unknown(unknown: Mapping[str, Any], *functions: Callable[..., Any]) -> None:
    """Raise TypeError for the first unknown argument, naming the nearest that a function has."""
    known = {name for function in functions for name in inspect.signature(function).parameters}
    for name in unknown.keys() - known:
        found = nearest(name, known)
        hint = f"; did you mean {found!r}?" if found else ""
        raise TypeError(f"{functions[0].__qualname__}() has no argument {name!r}{hint}")
