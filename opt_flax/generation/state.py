# SPDX-License-Identifier: Apache-2.0
"""What a decoding loop knows between two steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
from jax import Array

from opt_flax.cache import KVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The rows so far, and the scores of what comes next.

    The prompts stand to the right of their padding, so that all rows end in the same column.
    """

    tokens: Array  # [B, S] prompts, then new tokens, then columns not yet filled
    mask: Array  # [B, S] 1 at tokens of prompts and wherever new ones go, 0 at pads
    length: Array  # columns filled, an int32 scalar
    prompt_length: int = field(metadata={"static": True})
    finished: Array  # [B] whether the row has ended
    logits: Array  # [B, V] for the next column
    cache: KVCache | None
