# SPDX-License-Identifier: Apache-2.0
"""What the heads minimise."""

from __future__ import annotations

import tensorflow as tf
from tensorflow import Tensor

from opt_core import InputError
from opt_core.inputs import IGNORED_LABEL, check_ids, check_labels
from opt_core.tasks import ProblemType, check_class_labels, check_classes
from opt_tf.parts import at_least_float32, is_readable


def causal_lm_loss(logits: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """The mean cross-entropy of each token given those before it; labels of -100 do not count.

    Args:
        logits: [B, T, V].
        labels: [B, T].
        sample_weight: factors of the rows' losses, [B], or of the labels', [B, T].
    """
    check_labels(labels.shape, logits.shape)
    if is_readable(labels):
        values = labels[labels != IGNORED_LABEL]
        if len(values):
            smallest, largest = tf.reduce_min(values), tf.reduce_max(values)
            check_ids(int(smallest), int(largest), logits.shape[-1], "labels")
    weights = label_weights(sample_weight, labels)
    # The labels are shifted, not the logits: those are large.
    labels = tf.pad(labels[:, 1:], [[0, 0], [0, 1]], constant_values=IGNORED_LABEL)
    return cross_entropy(logits, labels, tf.roll(weights, -1, axis=1))


def count_labels(labels: Tensor) -> Tensor:
    """How many labels [B, T] count in `causal_lm_loss`: what a batch weighs among others."""
    return tf.reduce_sum(tf.cast(labels[:, 1:] != IGNORED_LABEL, tf.int32))


def classification_loss(
    logits: Tensor, labels: Tensor, problem: ProblemType, sample_weight: Tensor | None = None
) -> Tensor:
    """The mean squared error, cross-entropy or binary cross-entropy, as the problem asks for.

    `modeling_opt.py:1315-1335` of the reference.

    Args:
        logits: [B, num_labels].
        labels: [B] classes, of which -100 does not count, or [B, num_labels] numbers.
        sample_weight: factors of the rows' losses, [B], or of each number's, [B, num_labels].
    """
    check_class_labels(problem, labels.shape, logits.shape)
    if problem is ProblemType.SINGLE_LABEL:
        labels = tf.reshape(labels, (-1,))
        if is_readable(labels):
            values = labels[labels != IGNORED_LABEL]
            if len(values):
                smallest, largest = tf.reduce_min(values), tf.reduce_max(values)
                check_classes(int(smallest), int(largest), logits.shape[-1])
        return cross_entropy(logits, labels, label_weights(sample_weight, labels))
    logits = tf.cast(logits, at_least_float32(logits.dtype))
    labels = tf.cast(tf.reshape(labels, tf.shape(logits)), logits.dtype)
    weights = tf.cast(label_weights(sample_weight, logits), logits.dtype)
    if problem is ProblemType.REGRESSION:
        return tf.reduce_mean(tf.square(logits - labels) * weights)
    losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
    return tf.reduce_mean(losses * weights)


def span_loss(
    start_logits: Tensor,
    end_logits: Tensor,
    start: Tensor,
    end: Tensor,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """The mean of the cross-entropies of both ends of a span.

    Positions below 0 count as 0, and those beyond the text do not count
    (`modeling_opt.py:1449-1463` of the reference).

    Args:
        start_logits, end_logits: [B, T].
        start, end: [B] or [B, 1] positions.
        sample_weight: factors of the rows' losses, [B].
    """
    weights = label_weights(sample_weight, tf.reshape(start, (-1,)))

    def loss(logits: Tensor, positions: Tensor) -> Tensor:
        length = tf.shape(logits, positions.dtype)[1]
        positions = tf.clip_by_value(tf.reshape(positions, (-1,)), 0, length)
        counted = tf.where(positions == length, IGNORED_LABEL, positions)
        return cross_entropy(logits, counted, weights)

    return (loss(start_logits, start) + loss(end_logits, end)) / 2


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean over labels [...] that count, of logits [..., classes], in float32 at least.

    As in Keras, the divisor is the number of labels that count, whatever their weights.
    """
    labels = tf.cast(labels, tf.int64)
    counts = labels != IGNORED_LABEL
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        tf.where(counts, labels, 0), tf.cast(logits, at_least_float32(logits.dtype))
    )
    total = tf.reduce_sum(tf.where(counts, losses * tf.cast(weights, losses.dtype), 0))
    return total / tf.reduce_sum(tf.cast(counts, losses.dtype))


def label_weights(sample_weight: Tensor | None, labels: Tensor) -> Tensor:
    """The weight of each label [B] or [B, n]: its own, its row's, or 1.

    Raises:
        InputError: neither one weight for each row nor one for each label.
    """
    if sample_weight is None:
        return tf.ones(tf.shape(labels))
    weights = tf.convert_to_tensor(sample_weight)
    rows = labels.shape[:1]
    if weights.shape.rank == 2 and weights.shape[1] == 1:  # Keras may add a column
        weights = weights[:, 0]
    if weights.shape.is_compatible_with(rows):
        weights = tf.reshape(weights, (-1, *[1] * (labels.shape.rank - 1)))
    elif not weights.shape.is_compatible_with(labels.shape):
        raise InputError(
            f"sample_weight: expected a number for each row {tuple(rows)}, or for each label "
            f"{tuple(labels.shape)}; found the shape {tuple(weights.shape)}."
        )
    return tf.broadcast_to(weights, tf.shape(labels))
