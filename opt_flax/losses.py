# SPDX-License-Identifier: Apache-2.0
"""What the heads minimise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from opt_core.inputs import IGNORED_LABEL, check_ids, check_labels
from opt_core.tasks import ProblemType, check_class_labels, check_classes
from opt_flax.parts import is_readable


def causal_lm_loss(logits: Array, labels: Array) -> Array:
    """The mean cross-entropy of each token given those before it; labels of -100 do not count.

    Args:
        logits: [B, T, V].
        labels: [B, T].
    """
    check_labels(labels.shape, logits.shape)
    if is_readable(labels):
        values = np.asarray(labels)
        values = values[values != IGNORED_LABEL]
        if len(values):
            check_ids(int(values.min()), int(values.max()), logits.shape[-1], "labels")
    # The labels are shifted, not the logits: those are large.
    shifted = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    return cross_entropy(logits, shifted)


def count_labels(labels: Array) -> Array:
    """How many labels [B, T] count in `causal_lm_loss`: what a batch weighs among others."""
    return (labels[:, 1:] != IGNORED_LABEL).sum()


def classification_loss(logits: Array, labels: Array, problem: ProblemType) -> Array:
    """The mean squared error, cross-entropy or binary cross-entropy, as the problem asks for.

    `modeling_opt.py:1315-1335` of the reference.

    Args:
        logits: [B, num_labels].
        labels: [B] classes, of which -100 does not count, or [B, num_labels] numbers.
    """
    check_class_labels(problem, labels.shape, logits.shape)
    if problem is ProblemType.SINGLE_LABEL:
        labels = labels.reshape(-1)
        if is_readable(labels):
            values = np.asarray(labels)
            values = values[values != IGNORED_LABEL]
            if len(values):
                check_classes(int(values.min()), int(values.max()), logits.shape[-1])
        return cross_entropy(logits, labels)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    labels = labels.reshape(logits.shape).astype(logits.dtype)
    if problem is ProblemType.REGRESSION:
        return jnp.square(logits - labels).mean()
    return (jax.nn.softplus(logits) - logits * labels).mean()


def span_loss(start_logits: Array, end_logits: Array, start: Array, end: Array) -> Array:
    """The mean of the cross-entropies of both ends of a span.

    Positions below 0 count as 0, and those beyond the text do not count
    (`modeling_opt.py:1449-1463` of the reference).

    Args:
        start_logits, end_logits: [B, T].
        start, end: [B] or [B, 1] positions.
    """
    length = start_logits.shape[1]

    def loss(logits: Array, positions: Array) -> Array:
        positions = positions.reshape(-1).clip(0, length)
        return cross_entropy(logits, jnp.where(positions == length, IGNORED_LABEL, positions))

    return (loss(start_logits, start) + loss(end_logits, end)) / 2


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean over labels [...] that count, of logits [..., classes], in float32 at least.

    A label that is no class, where its value cannot be read, makes it NaN.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    labels = labels.astype(jnp.int32)
    counts = labels != IGNORED_LABEL
    # Beyond the last class lies NaN; below 0, JAX would count from the end.
    target = jnp.where(labels < 0, logits.shape[-1], labels)[..., None]  # [..., 1]
    chosen = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen  # [...]
    return jnp.where(counts, losses, 0).sum() / counts.sum()
