# SPDX-License-Identifier: Apache-2.0
"""The stopping criteria that options ask for; a caller may give more."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class MaxTime:
    """Ends all rows `seconds` after `start`, a reading of `time.monotonic`."""

    seconds: float
    start: float

    def __call__(self, tokens: Any, scores: Any) -> bool:
        return time.monotonic() - self.start > self.seconds


@dataclass(frozen=True)
class StopStrings:
    """Ends a row as soon as its last token completes one of the strings; its rest is kept.

    Each token has a byte at least, so a row's last tokens, as many as the longest string has bytes
    and one more, tell.
    """

    strings: tuple[str, ...]
    tokenizer: Any
    to_numpy: Callable[[Any], NDArray[Any]]

    def __call__(self, tokens: Any, scores: Any) -> NDArray[np.bool_]:
        window = 1 + max(len(text.encode()) for text in self.strings)
        rows = self.to_numpy(tokens[:, -window:])
        return np.array([self._ends(row.tolist()) for row in rows])

    def _ends(self, row: list[int]) -> bool:
        text, before = self.tokenizer.decode(row), self.tokenizer.decode(row[:-1])
        return any(_count(stop, text) > _count(stop, before) for stop in self.strings)


def _count(stop: str, text: str) -> int:
    """How often a string occurs, overlaps included."""
    return sum(text.startswith(stop, start) for start in range(len(text)))
