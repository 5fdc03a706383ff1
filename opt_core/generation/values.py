# SPDX-License-Identifier: Apache-2.0
"""What options of generation may hold, the hashable forms that they are kept in, and their token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from opt_core.errors import ConfigError
from opt_core.validation import (
    Check,
    number,
    one_of,
    whole,
)


def listed(check: Check) -> Check:
    """A list, not empty, whose members pass the check."""

    def checked(name: str, value: object) -> None:
        if not isinstance(value, list | tuple) or not value:
            raise ConfigError(f"{name}: expected a list that is not empty, found {value!r}.")
        for index, member in enumerate(value):
            check(f"{name}[{index}]", member)

    return checked


def pair(first: Check, second: Check) -> Check:
    def checked(name: str, value: object) -> None:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ConfigError(f"{name}: expected a pair, found {value!r}.")
        first(f"{name}[0]", value[0])
        second(f"{name}[1]", value[1])

    return checked


def early_stopping(name: str, value: object) -> None:
    if not isinstance(value, bool) and value != "never":
        raise ConfigError(f"{name}: expected True, False or 'never', found {value!r}.")


def stop_strings(name: str, value: object) -> None:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not strings:
        raise ConfigError(f"{name}: expected a string or a list of them, found {value!r}.")
    if not all(isinstance(text, str) and text for text in strings):
        raise ConfigError(f"{name}: expected strings that are not empty, found {value!r}.")


def dola_layers(name: str, value: object) -> None:
    if isinstance(value, str):
        return one_of(("low", "high"), "choice of layers")(name, value)
    return listed(whole(0))(name, value)


def words(name: str, value: object) -> None:
    """Words that must appear, each a list of ids, or a list of alternatives."""
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{name}: expected a list of words, found {value!r}.")
    for index, word in enumerate(value):
        nested = isinstance(word, list | tuple) and word and not isinstance(word[0], int)
        check = listed(listed(_id)) if nested else listed(_id)
        check(f"{name}[{index}]", word)


def float32(check: Check) -> Check:
    """The check, for a number that scores of float32 are computed with."""

    def checked(name: str, value: object) -> None:
        check(name, value)
        if isinstance(value, int | float) and abs(value) > _LARGEST:
            raise ConfigError(f"{name}: expected a number of float32, found {value!r}.")

    return checked


def sequence_bias(name: str, value: object) -> None:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    listed(pair(listed(_id), float32(number)))(name, pairs)


def plain(value: Any) -> Any:
    """The value with Python's numbers and lists for numpy's, however deep."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return type(value)(plain(member) for member in value)
    return value


def tuples(value: Any) -> Any:
    """The value with tuples for lists, however deep."""
    return tuple(tuples(member) for member in value) if isinstance(value, list | tuple) else value


def bias_pairs(value: Any) -> Any:
    return tuples(list(value.items()) if isinstance(value, Mapping) else value)


def one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuples(value)


_id = whole(0)
ids = listed(_id)
_LARGEST = float(np.finfo(np.float32).max)


def tokens(value: Any) -> Iterator[int]:
    """The token ids in a value, however deep."""
    if isinstance(value, tuple):
        for member in value:
            yield from tokens(member)
    elif value is not None:
        yield value


def forced(value: Any) -> Iterator[int]:
    """The token ids in pairs of a position and a token."""
    return tokens(tuple(token for _, token in value or ()))


def biased(value: Any) -> Iterator[int]:
    """The token ids in pairs of tokens and a bias."""
    return tokens(tuple(ids for ids, _ in value or ()))
