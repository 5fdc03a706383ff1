# SPDX-License-Identifier: Apache-2.0
"""What a decoding loop knows between two steps."""

from __future__ import annotations

from typing import Any, NamedTuple

from tensorflow import Tensor


class DecodeState(NamedTuple):
    """The rows so far, and the scores of what comes next.

    The prompts stand to the right of their padding, so that all rows end in the same column.
    """

    tokens: Tensor  # [B, S] prompts, then new tokens, then columns not yet filled
    mask: Tensor  # [B, S] 1 at tokens of prompts and wherever new ones go, 0 at pads
    length: Tensor  # columns filled
    prompt_length: Tensor
    finished: Tensor  # [B] whether the row has ended
    logits: Tensor  # [B, V] for the next column
    cache: Any  # KVCache
