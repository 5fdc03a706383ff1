# SPDX-License-Identifier: Apache-2.0
"""Which compiled programs a process keeps."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator

import pytest

from opt_core import InputError
from opt_core.programs import (
    DEFAULT_LIMIT,
    Programs,
    clear_compiled,
    count_programs,
    program_limit,
    set_program_limit,
)


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    clear_compiled()
    set_program_limit(3)
    yield
    set_program_limit(DEFAULT_LIMIT)


def get(owner: Programs, *keys: str) -> list[str]:
    """Those of the keys that had to be made."""
    made = []
    for key in keys:
        owner.get(key, lambda key=key: made.append(key) or key)
    return made


def test_made_once() -> None:
    owner = Programs()
    assert get(owner, "a", "b", "a", "b") == ["a", "b"]
    assert [*owner] == ["a", "b"] and len(owner) == count_programs() == 2


def test_the_least_recently_used_of_all_owners_goes() -> None:
    one, other = Programs(), Programs()
    get(one, "a", "b")
    get(other, "c")
    get(one, "a")
    get(other, "d")
    assert [*one] == ["a"] and [*other] == ["c", "d"]
    assert count_programs() == program_limit() == 3


def test_freed_with_their_owner() -> None:
    one, other = Programs(), Programs()
    get(one, "a", "b")
    get(other, "c")
    del one
    gc.collect()
    assert count_programs() == 1
    assert get(other, "d", "e", "c") == ["d", "e"], "those of the other no longer count"


def test_cleared() -> None:
    one, other = Programs(), Programs()
    get(one, "a")
    get(other, "b")
    one.clear()
    assert count_programs() == 1
    clear_compiled()
    assert count_programs() == 0 and get(other, "b") == ["b"]


def test_a_lower_limit_frees_at_once() -> None:
    owner = Programs()
    get(owner, "a", "b", "c")
    set_program_limit(1)
    assert [*owner] == ["c"]


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3", None])
def test_no_other_limits(limit: object) -> None:
    with pytest.raises(InputError, match="whole number of at least 1"):
        set_program_limit(limit)  # type: ignore[arg-type]


def test_a_copy_has_none() -> None:
    owner = Programs()
    get(owner, "a")
    for twin in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert len(twin) == 0 and len(owner) == 1
