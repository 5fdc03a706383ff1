# SPDX-License-Identifier: Apache-2.0
"""The loss in pieces is the plain one, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opt_torch.losses import causal_lm_loss, cross_entropy
from opt_torch.parts import CrossEntropy

#: More than two pieces, the last one smaller.
ROWS, CLASSES = 2 * CrossEntropy.rows + 3, 7


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def example(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (ROWS,))
    labels[::5] = -100
    return (3 * torch.randn(ROWS, CLASSES)).to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype: torch.dtype) -> None:
    logits, labels = example(dtype)
    found, expected = cross_entropy(logits, labels), plain(logits, labels)
    torch.testing.assert_close(found, expected)
    (found_gradient,) = torch.autograd.grad(3 * found, logits)
    (gradient,) = torch.autograd.grad(3 * expected, logits)
    assert found_gradient.dtype == dtype
    torch.testing.assert_close(found_gradient, gradient)


def test_second_derivatives() -> None:
    logits, labels = example(torch.float64)

    def curvature(loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss**2, logits, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), logits)[0]

    found, expected = curvature(cross_entropy(logits, labels)), curvature(plain(logits, labels))
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(found, expected)


def test_no_label_that_counts() -> None:
    logits, labels = example(torch.float32)
    assert cross_entropy(logits, torch.full_like(labels, -100)).isnan()


def test_an_infinite_score_that_does_not_count() -> None:
    logits, labels = example(torch.float32)
    with torch.no_grad():
        logits[0] = -torch.inf
        assert cross_entropy(logits, labels) == pytest.approx(plain(logits, labels).item())


def test_the_last_token_predicts_nothing() -> None:
    """Labels are shifted, not logits: the last column of logits gets no gradient."""
    logits = torch.randn(2, 5, CLASSES, requires_grad=True)
    labels = torch.randint(CLASSES, (2, 5))
    loss = causal_lm_loss(logits, labels)
    expected = plain(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert not logits.grad[:, -1].any() and logits.grad[:, :-1].all()
