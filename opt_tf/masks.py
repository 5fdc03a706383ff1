# SPDX-License-Identifier: Apache-2.0
"""From the attention mask: each token's position, and which keys each query may see."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf
from tensorflow import Tensor

from opt_tf.parts import is_readable


class Bias(NamedTuple):
    """What is added to the scores of keys, and which queries may see none.

    These attend to all keys alike, in their gradient too: the kernels set such a query to 0.
    """

    values: Tensor  # [B or 1, 1, T, S] the lowest finite number at keys that are hidden; else 0
    blind: Tensor | None  # [B or 1, 1, T, 1]; None where each query sees itself


def positions_from_mask(
    attention_mask: Tensor, past_length: int | Tensor, query_length: int | Tensor
) -> Tensor:
    """Each token's index among the real tokens of its row; -1 at pads.

    `modeling_opt.py:97-107` of the reference: cumsum(mask) * mask - 1, then the part beyond the past.

    Args:
        attention_mask: [B, S], 1 at real tokens and 0 at pads.

    Returns:
        [B, T], int32.
    """
    mask = tf.cast(attention_mask, tf.int32)
    positions = tf.cumsum(mask, axis=1) * mask - 1
    return tf.slice(positions, [0, past_length], [-1, query_length])


def packed_texts(position_ids: Tensor) -> Tensor | None:
    """Which of the texts packed into its row each token belongs to; None where that is seen to be one.

    A text begins at position 0, wherever pads (-1) stand; the first of a row is counted as 0.

    Args:
        position_ids: [B or 1, T].

    Returns:
        [B or 1, T].
    """
    tokens = tf.cumsum(tf.cast(position_ids >= 0, tf.int32), axis=1)
    begins = (position_ids == 0) & (tokens > 1)
    if is_readable(begins) and not tf.reduce_any(begins):
        return None
    return tf.cumsum(tf.cast(begins, tf.int32), axis=1)


def attention_bias(
    attention_mask: Tensor | None,
    query_length: int | Tensor,
    key_length: int | Tensor,
    past_length: int | Tensor,
    dtype: tf.DType,
    texts: Tensor | None = None,
) -> Bias:
    """What hides from a query the keys behind it, pads, and other texts.

    The lowest finite number, not -inf: a row in which every key is masked stays finite.

    Args:
        attention_mask: [B, S], 1 at real tokens; None where all are real.
        texts: [B or 1, T], which text a token belongs to and sees; None where there is one in a row.
    """
    query = past_length + tf.range(query_length)[:, None]  # [T, 1]
    key = tf.range(key_length)  # [S]
    visible = (key <= query)[None, None]  # [1, 1, T, S]
    if attention_mask is not None:
        real = tf.cast(attention_mask, tf.int32) == 1
        visible = visible & real[:, None, None, :]  # [B, 1, T, S]
    if texts is not None:
        visible = visible & (texts[:, None, :, None] == texts[:, None, None, :])
    blind = None
    if attention_mask is not None:
        blind = ~tf.reduce_any(visible, axis=-1, keepdims=True)
        visible = visible | blind
    return Bias(tf.where(visible, tf.zeros((), dtype), tf.constant(dtype.min, dtype)), blind)
