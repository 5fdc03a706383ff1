# SPDX-License-Identifier: Apache-2.0
"""The smallest parts, which PyTorch has but not quite as OPT needs them."""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """A linear layer without initial values of its own: `opt_torch.weights` draws them."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """An embedding without initial values of its own: `opt_torch.weights` draws them."""

    def reset_parameters(self) -> None:
        pass
