# SPDX-License-Identifier: Apache-2.0
"""The smallest parts, which PyTorch has but not quite as OPT needs them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer without initial values of its own: `opt_torch.weights` draws them."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """An embedding without initial values of its own: `opt_torch.weights` draws them."""

    def reset_parameters(self) -> None:
        pass


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def is_readable(tensor: Tensor) -> bool:
    """Whether the values are at hand: not traced, faked or mapped over, nor on an accelerator."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and torch._C._functorch.peek_interpreter_stack() is None
    )
