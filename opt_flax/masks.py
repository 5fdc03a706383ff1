# SPDX-License-Identifier: Apache-2.0
"""From the attention mask: each token's position, and which keys each query may see."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from opt_flax.parts import is_readable


class Bias(NamedTuple):
    """What is added to the scores of keys, and which queries may see none.

    These attend to all keys alike, in their gradient too: the kernels set such a query to 0.
    """

    values: Array  # [B or 1, 1, T, S] the lowest finite number at keys that are hidden; else 0
    blind: Array | None  # [B or 1, 1, T, 1]; None where each query sees itself


def positions_from_mask(
    attention_mask: Array, past_length: int | Array, query_length: int
) -> Array:
    """Each token's index among the real tokens of its row; -1 at pads.

    `modeling_opt.py:97-107` of the reference: cumsum(mask) * mask - 1, then the part beyond the past.

    Args:
        attention_mask: [B, S], 1 at real tokens and 0 at pads.

    Returns:
        [B, T] with T = query_length, from column `past_length` on, int32.
    """
    mask = attention_mask.astype(jnp.int32)
    positions = jnp.cumsum(mask, axis=1) * mask - 1
    return jax.lax.dynamic_slice_in_dim(positions, past_length, query_length, axis=1)


def packed_texts(position_ids: Array) -> Array | None:
    """Which of the texts packed into its row each token belongs to; None where that is seen to be one.

    A text begins at position 0, wherever pads (-1) stand; the first of a row is counted as 0.

    Args:
        position_ids: [B or 1, T].

    Returns:
        [B or 1, T].
    """
    tokens = (position_ids >= 0).cumsum(axis=1)
    begins = (position_ids == 0) & (tokens > 1)
    if is_readable(begins) and not begins.any():
        return None
    return begins.cumsum(axis=1)


def attention_bias(
    attention_mask: Array | None,
    query_length: int,
    key_length: int,
    past_length: int | Array,
    dtype: Any,
    texts: Array | None = None,
) -> Bias:
    """What hides from a query the keys behind it, pads, and other texts.

    The lowest finite number, not -inf: a row in which every key is masked stays finite.

    Args:
        attention_mask: [B, S], 1 at real tokens; None where all are real.
        texts: [B or 1, T], which text a token belongs to and sees; None where there is one in a row.
    """
    query = past_length + jnp.arange(query_length)[:, None]  # [T, 1]
    key = jnp.arange(key_length)  # [S]
    visible = (key <= query)[None, None]  # [1, 1, T, S]
    if attention_mask is not None:
        visible = visible & (attention_mask == 1)[:, None, None, :]  # [B, 1, T, S]
    if texts is not None:
        visible = visible & (texts[:, None, :, None] == texts[:, None, None, :])
    blind = None
    if attention_mask is not None:
        blind = ~visible.any(axis=-1, keepdims=True)
        visible = visible | blind
    return Bias(jnp.where(visible, jnp.zeros((), dtype), jnp.finfo(dtype).min), blind)
