# SPDX-License-Identifier: Apache-2.0
"""The stopping criteria that options ask for."""

from __future__ import annotations

import numpy as np
import pytest

from opt_core.generation.stopping import StopStrings


class Characters:
    """A tokenizer of characters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("string", "text", "ends"),
    [
        ("ab", "xab", True),
        ("ab", "abx", False),
        ("ab", "abxab", True),
        ("aa", "aaa", True),  # the prompt ended with one of them
        ("aa", "aab", False),
        ("abc", "abcab", False),
    ],
)
def test_the_last_token_completes_a_string(string: str, text: str, ends: bool) -> None:
    criterion = StopStrings((string,), Characters(), np.asarray)
    assert criterion(np.array([[ord(character) for character in text]]), None).tolist() == [ends]
