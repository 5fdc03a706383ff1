# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-2 (Dao 2023, arXiv:2307.08691): no kernel sees a pad, and none makes weights [T, S].

The kernels are those of the flash_attn package where it is installed, and else PyTorch's own build of
them. Both are called as the package's functions are; rows of one length go into the dense one, and of
rows with pads, or with several texts, the real tokens alone, one text after another, into the other.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from opt_core import UnsupportedError

DTYPES = (torch.float16, torch.bfloat16)
DEVICES = ("cuda", "meta")
OLDEST_CAPABILITY = (8, 0)  # of the GPU: Ampere
OLDEST_PACKAGE = (2, 1)  # of flash_attn: since then the last query sees the last key


class Kernels(NamedTuple):
    """Two functions with the signatures of flash_attn's."""

    #: (q [B, T, N, H], k, v [B, S, N, H], dropout_p, softmax_scale, causal) -> [B, T, N, H]
    dense: Callable[..., Tensor]
    #: (q [tokens, N, H], k, v, cu_seqlens_q [texts + 1], cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    #: dropout_p, softmax_scale, causal) -> [tokens, N, H]; None where PyTorch has none.
    varlen: Callable[..., Tensor] | None
    #: Whether `varlen` has dropout.
    drops: bool


class Packed(NamedTuple):
    """Where the real tokens lie: those of each text follow one another."""

    queries: Tensor  # [tokens], of B * T
    keys: Tensor  # [tokens], of B * S
    query_ends: Tensor  # [texts + 1], int32: 0, then how many tokens end with each text
    key_ends: Tensor  # [texts + 1], int32
    longest_query: int
    longest_key: int


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Packed | None,
    is_causal: bool,
    head_mask: Tensor | None,
    dropout: float,
) -> tuple[Tensor, None]:
    """Attention on a GPU; arguments and results as `sdpa_attention`, but for

    Args:
        packed: where the real tokens are, if there are pads or several texts; None where all are.
        is_causal: whether a query sees no key behind its own; the last query's is the last key.

    Returns:
        Context [B, N, T, H], zero at pads; None.

    Raises:
        UnsupportedError: a device, GPU or dtype that these kernels do not know.
    """
    _check(query)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, T or S, N, H]
    if packed is None:
        context = kernels().dense(query, key, value, dropout, 1.0, is_causal)
        return context.transpose(1, 2), None
    tokens = packed_kernel(dropout)(
        query.flatten(0, 1).index_select(0, packed.queries),
        key.flatten(0, 1).index_select(0, packed.keys),
        value.flatten(0, 1).index_select(0, packed.keys),
        packed.query_ends,
        packed.key_ends,
        packed.longest_query,
        packed.longest_key,
        dropout,
        1.0,
        is_causal,
    )  # [tokens, N, H]
    places = tokens.new_zeros((query.shape[0] * query.shape[1], *query.shape[2:]))
    context = places.index_copy(0, packed.queries, tokens).view(query.shape)
    return context.transpose(1, 2), None


def can_pack(dropout: float) -> bool:
    """Whether there is a kernel for texts of several lengths, with dropout if there is some."""
    return kernels().varlen is not None and (kernels().drops or not dropout)


def packed_kernel(dropout: float) -> Callable[..., Tensor]:
    """That kernel; UnsupportedError where there is none."""
    found = kernels().varlen
    if found is None or not can_pack(dropout):
        raise UnsupportedError(
            "Rows with pads or several texts, and attention dropout, need the flash_attn package here: "
            "install it, or use attn_implementation='sdpa'."
        )
    return found


def pack(
    attention_mask: Tensor | None, texts: Tensor | None, batch_size: int, length: int
) -> Packed | None:
    """Finds the real tokens, for which the host waits; None where all are and each row is one text.

    Args:
        attention_mask: [B, S], 1 at real tokens; None where all are.
        texts: [B or 1, T], which text a token belongs to and sees, if T = S; None where each row is one.
        length: T, the last columns, which are queries.
    """
    if attention_mask is not None:
        real = attention_mask == 1  # [B, S]
    elif texts is not None:
        real = torch.ones((batch_size, length), dtype=torch.bool, device=texts.device)
    else:
        return None
    asking = real[:, real.shape[1] - length :]  # [B, T]
    if texts is None:
        query_counts, key_counts = asking.sum(1), real.sum(1)  # [B], some of them 0
    else:
        rows = torch.arange(batch_size, device=texts.device)[:, None] * length
        _, query_counts = torch.unique_consecutive((rows + texts)[real], return_counts=True)
        key_counts = query_counts
    if len(key_counts) == batch_size and bool(real.all()):
        return None
    return Packed(
        asking.flatten().nonzero()[:, 0],
        real.flatten().nonzero()[:, 0],
        _ends(query_counts),
        _ends(key_counts),
        int(query_counts.max()),
        int(key_counts.max()),
    )


def _ends(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0)).int()


def _check(query: Tensor) -> None:
    device = query.device
    if device.type not in DEVICES:
        raise UnsupportedError(
            f"attn_implementation='flash_attention_2': expected a CUDA device, found {device}. Call "
            "model.to('cuda'), or load the model with attn_implementation='sdpa'."
        )
    if query.dtype not in DTYPES:
        raise UnsupportedError(
            "attn_implementation='flash_attention_2': expected float16 or bfloat16, found "
            f"{query.dtype}. Load the model with dtype=torch.float16, call model.half(), compute under "
            "torch.autocast, or load it with attn_implementation='sdpa'."
        )
    if _is_old(device):
        raise UnsupportedError(
            "attn_implementation='flash_attention_2': expected a GPU of compute capability 8.0 or more "
            "(Ampere), found an older one. Use attn_implementation='sdpa'."
        )


def _is_old(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY


def kernels() -> Kernels:
    """The package's functions, or PyTorch's own; looked for once, when the first model is made."""
    if not _FOUND:
        _FOUND.append(_of_package() or Kernels(_dense, _own_varlen(), drops=False))
    return _FOUND[0]


_FOUND: list[Kernels] = []


def _of_package() -> Kernels | None:
    try:
        import flash_attn
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        warnings.warn(
            f"flash_attn is installed but cannot be imported ({error}): PyTorch's own FlashAttention-2 "
            "runs instead.",
            stacklevel=2,
        )
        return None
    version = tuple(int(part) for part in flash_attn.__version__.split(".")[:2])
    if version < OLDEST_PACKAGE:
        return None
    return Kernels(flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func, drops=True)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool
) -> Tensor:
    """PyTorch's FlashAttention-2, with the signature of `flash_attn_func`."""
    from torch.nn.attention.bias import (
        causal_lower_right,  # which loads much, and late is soon enough
    )

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, T or S, H]
    continues = causal and q.shape[2] != k.shape[2]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=causal_lower_right(q.shape[2], k.shape[2]) if continues else None,
            dropout_p=dropout_p,
            is_causal=causal and not continues,
            scale=softmax_scale,
        )
    return context.transpose(1, 2)


def _own_varlen() -> Callable[..., Tensor] | None:
    """PyTorch's FlashAttention-2 for texts of several lengths, as `flash_attn_varlen_func` is called."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,  # 0: see `drops`
        softmax_scale: float,
        causal: bool,
    ) -> Tensor:
        options: dict[str, Any] = {"scale": softmax_scale}
        if "scale" not in parameters:  # it scales by H**-0.5 itself
            options, q = {}, q * (softmax_scale * q.shape[-1] ** 0.5)
        if "window_size" in parameters:
            options["window_size"] = (-1, 0 if causal else -1)
        else:
            options["is_causal"] = causal
        ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        found: Any = varlen_attn(q, k, v, *ends, *longest, **options)
        return found

    return varlen
