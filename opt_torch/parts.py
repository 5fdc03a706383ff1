# SPDX-License-Identifier: Apache-2.0
"""The smallest parts, which PyTorch has but not quite as OPT needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from opt_core.inputs import IGNORED_LABEL
from opt_torch.weights import from_numpy


class DecodingWeight(Protocol):
    """A weight in another form than [out, in], for decoding alone."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] -> [..., out]"""

    def plain(self) -> Tensor:
        """The weight as it was, [out, in]; UnsupportedError where that is lost."""


class Linear(nn.Linear):
    """A linear layer without initial values of its own: `opt_torch.weights` draws them.

    While it has a `decoding_weight`, `weight` is empty, or serves only the embedding tied to it.
    Whatever needs the plain weight restores it first.
    """

    decoding_weight: DecodingWeight | None = None

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if self.decoding_weight is not None:
            if not (torch.is_grad_enabled() and self.weight.requires_grad):
                return self.decoding_weight.linear(x, self.bias)
            self.restore()
        return super().forward(x)

    def restore(self) -> None:
        if self.decoding_weight is not None:
            plain = self.decoding_weight.plain()
            if not self.weight.numel():
                self.weight.data = plain  # the same parameter: an optimizer may hold it
            self.decoding_weight = None

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.restore()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.restore()
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.restore()
        return self.__dict__


_WITHOUT_VALUES: ContextVar[bool] = ContextVar("_WITHOUT_VALUES", default=False)


@contextmanager
def without_values() -> Iterator[None]:
    """Within, OPT's own layers are made without values; those of a user's class have theirs."""
    token = _WITHOUT_VALUES.set(True)
    try:
        yield
    finally:
        _WITHOUT_VALUES.reset(token)


def own_layers() -> AbstractContextManager[Any]:
    """What OPT's own layers are made in."""
    return torch.device("meta") if _WITHOUT_VALUES.get() else nullcontext()


class Embedding(nn.Embedding):
    """An embedding without initial values of its own: `opt_torch.weights` draws them."""

    def reset_parameters(self) -> None:
        pass


class CrossEntropy(Function):
    """`F.cross_entropy` without copies of the logits beside their gradient: some rows at a time.

    Logits are the largest tensors of a training. The plain operations make four more of their size, and
    on a CPU new memory takes more time than what is computed in it.
    """

    rows = 64

    @classmethod
    def pieces(cls, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(x.split(cls.rows) for x in tensors), strict=True)

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """[R, V] and [R], of which -100 does not count -> the mean, in float32 at least."""
        counts = labels[:, None] != IGNORED_LABEL  # [R, 1]
        classes = labels[:, None].where(counts, 0)
        norms, scores = [], []
        for part, chosen in CrossEntropy.pieces(logits, classes):
            part = part.to(at_least_float32(part.dtype))
            norms.append(part.logsumexp(-1, keepdim=True))
            scores.append(part.gather(-1, chosen))
        norm, score = torch.cat(norms), torch.cat(scores)  # [R, 1]
        ctx.save_for_backward(logits, labels, norm)
        return (norm - score).where(counts, 0).sum() / counts.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels, norm = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient has one of its own
            loss = F.cross_entropy(logits.to(norm.dtype), labels, ignore_index=IGNORED_LABEL)
            return torch.autograd.grad(loss, logits, gradient, create_graph=True)[0], None
        counts = labels[:, None] != IGNORED_LABEL  # [R, 1]
        classes = labels[:, None].where(counts, 0)
        factors = gradient / counts.sum() * counts
        found = torch.empty_like(logits)
        for part, chosen, shift, factor, result in CrossEntropy.pieces(
            logits, classes, norm, factors, found
        ):
            weights = (part - shift).exp_()  # of the softmax
            weights.scatter_add_(-1, chosen, torch.full_like(shift, -1))
            result.copy_(weights.mul_(factor))
        return found, None


def to_tensor(value: Any, device: torch.device | None) -> Tensor:
    """The tensor itself, or a copy of what numpy takes for an array: tensors can be written to."""
    if isinstance(value, Tensor):
        return value
    return from_numpy(np.array(value)).to(device)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def is_readable(tensor: Tensor) -> bool:
    """Whether the values are at hand: not traced, faked or mapped over, nor on an accelerator."""
    return tensor.device.type == "cpu" and is_concrete(tensor)


def is_concrete(tensor: Tensor) -> bool:
    """Whether there are values, though the host may have to wait for an accelerator to see them."""
    return (
        type(tensor) is Tensor
        and tensor.device.type != "meta"
        and tensor.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and torch._C._functorch.peek_interpreter_stack() is None
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )
