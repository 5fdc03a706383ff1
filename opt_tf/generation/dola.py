# SPDX-License-Identifier: Apache-2.0
"""DoLa: logits that say what the late layers know and the early ones do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation.dola import RELATIVE_TOP


def early_logits(model: Any, hidden_states: Sequence[Tensor]) -> list[Tensor]:
    """What the head makes [B, T, V] of each layer's hidden states [B, T, D], without a final norm."""
    project = model.model.decoder.project_out
    return [model.compute_logits(x if project is None else project(x)) for x in hidden_states]


def contrasted(logits: Tensor, early: Sequence[Tensor]) -> Tensor:
    """Log-probabilities [B, T, V], less those of the early layer that is most unlike them.

    `_dola_select_contrast` of transformers from 4.45 on, for each row as if it were alone.
    """
    late = tf.nn.log_softmax(tf.cast(logits, tf.float32))
    layers = tf.nn.log_softmax(tf.cast(tf.stack(early), tf.float32))  # [L, B, T, V]
    mean = tf.math.softplus(layers - late) + late - math.log(2)
    divergence = tf.reduce_sum(tf.exp(mean) * (2 * mean - late - layers), axis=-1)  # [L, B, T]
    chosen = tf.argmax(divergence, axis=0)
    base = tf.gather(tf.transpose(layers, (1, 2, 0, 3)), chosen, batch_dims=2)
    lowest = tf.reduce_max(late, axis=-1, keepdims=True) + math.log(RELATIVE_TOP)
    return tf.where(late < lowest, float("-inf"), late - base)
