# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: what followed the last tokens when they stood there before."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray


def look_up(tokens: NDArray[Any], longest: int, count: int) -> NDArray[Any]:
    """Up to `count` tokens that followed the first occurrence of the n-gram that ends the tokens.

    `PromptLookupCandidateGenerator` of the reference: the longest n-gram first, down to one token.

    Args:
        tokens: [columns] of one row, without pads.
        longest: the size of the longest n-gram.

    Returns:
        [0 to count]: nothing where no n-gram occurred before.
    """
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        earlier = sliding_window_view(tokens[:-1], size)
        matches = np.flatnonzero((earlier == tokens[-size:]).all(axis=1))
        if len(matches):
            start = matches[0] + size
            return tokens[start : start + count]
    return tokens[:0]
