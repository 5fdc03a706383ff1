# SPDX-License-Identifier: Apache-2.0
"""What the heads minimise."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from opt_core.inputs import IGNORED_LABEL, check_ids, check_labels
from opt_core.tasks import ProblemType, check_class_labels, check_classes
from opt_torch.parts import CrossEntropy, at_least_float32, is_readable


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of each token given those before it; labels of -100 do not count.

    Args:
        logits: [B, T, V].
        labels: [B, T].
    """
    check_labels(labels.shape, logits.shape)
    if is_readable(labels):
        values = labels[labels != IGNORED_LABEL]
        if len(values):
            check_ids(int(values.min()), int(values.max()), logits.shape[-1], "labels")
    # The labels are shifted, not the logits: those are large.
    return cross_entropy(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL))


def count_labels(labels: Tensor) -> Tensor:
    """How many labels [B, T] count in `causal_lm_loss`: what a batch weighs among others."""
    return (labels[:, 1:] != IGNORED_LABEL).sum()


def classification_loss(logits: Tensor, labels: Tensor, problem: ProblemType) -> Tensor:
    """The mean squared error, cross-entropy or binary cross-entropy, as the problem asks for.

    `modeling_opt.py:1315-1335` of the reference.

    Args:
        logits: [B, num_labels].
        labels: [B] classes, of which -100 does not count, or [B, num_labels] numbers.
    """
    check_class_labels(problem, labels.shape, logits.shape)
    labels = labels.to(logits.device)
    if problem is ProblemType.SINGLE_LABEL:
        labels = labels.flatten()
        if is_readable(labels):
            values = labels[labels != IGNORED_LABEL]
            if len(values):
                check_classes(int(values.min()), int(values.max()), logits.shape[-1])
        return cross_entropy(logits, labels)
    logits = logits.to(at_least_float32(logits.dtype))
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if problem is ProblemType.REGRESSION:
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def span_loss(start_logits: Tensor, end_logits: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The mean of the cross-entropies of both ends of a span.

    Positions below 0 count as 0, and those beyond the text do not count
    (`modeling_opt.py:1449-1463` of the reference).

    Args:
        start_logits, end_logits: [B, T].
        start, end: [B] or [B, 1] positions.
    """
    length = start_logits.shape[1]

    def loss(logits: Tensor, positions: Tensor) -> Tensor:
        positions = positions.to(logits.device).flatten().clamp(0, length)
        return cross_entropy(logits, positions.masked_fill(positions == length, IGNORED_LABEL))

    return (loss(start_logits, start) + loss(end_logits, end)) / 2


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over labels [...] that count, of logits [..., classes], in float32 at least."""
    logits, labels = logits.flatten(0, -2), labels.to(logits.device).flatten().long()
    if is_readable(logits):
        return CrossEntropy.apply(logits, labels)
    logits = logits.to(at_least_float32(logits.dtype))
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)
