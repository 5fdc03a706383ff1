# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup, and how many tokens are proposed at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_core.generation.lookup import look_up
from opt_core.generation.strategies import AssistedSearch


def searched(tokens: list[int], longest: int, count: int) -> list[int]:
    """The definition: the longest n-gram first, its first occurrence that something follows."""
    for size in range(longest, 0, -1):
        for start in range(len(tokens) - size):
            if tokens[start : start + size] == tokens[-size:]:
                return tokens[start + size :][:count]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=24), st.integers(1, 5), st.integers(0, 6))
def test_what_followed_the_last_tokens_before(tokens: list[int], longest: int, count: int) -> None:
    assert look_up(np.array(tokens), longest, count).tolist() == searched(tokens, longest, count)


@pytest.mark.parametrize(
    ("tokens", "longest", "expected"),
    [
        ([7, 8, 9, 5, 7, 8], 2, [9, 5, 7]),
        ([7, 8, 9, 5, 7, 8], 1, [9, 5, 7]),
        ([8, 1, 7, 8, 2, 7, 8], 2, [2, 7, 8]),  # two tokens are better than the first one alone
        ([8, 1, 7, 8, 2, 7, 8], 1, [1, 7, 8]),
        ([4, 4], 2, [4]),  # an n-gram may overlap with what it is compared with
        ([1, 2, 3], 2, []),
        ([1], 2, []),
    ],
)
def test_examples(tokens: list[int], longest: int, expected: list[int]) -> None:
    assert look_up(np.array(tokens), longest, 3).tolist() == expected


def test_the_next_number_of_proposals() -> None:
    heuristic, constant = AssistedSearch(), AssistedSearch(constant=True)
    assert heuristic.next_count(5, accepted=5) == 7
    assert heuristic.next_count(5, accepted=4) == 4
    assert heuristic.next_count(1, accepted=0) == 1
    assert [constant.next_count(5, accepted) for accepted in (0, 5)] == [5, 5]
