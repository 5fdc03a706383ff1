# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention, and the kernels that it can run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from opt_core import OPTConfig
from opt_core.calls import Kernel
from opt_torch.cache import LayerCache
from opt_torch.flash import Packed, can_pack, flash_attention
from opt_torch.masks import Bias
from opt_torch.parts import Linear, at_least_float32


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    is_causal: bool,
    head_mask: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Attention in plain operations, the only kernel that shows its weights and masks heads.

    Args:
        query: [B, N, T, H], already scaled.
        key, value: [B, N, S, H].
        bias: which keys are hidden from which queries; None where none is.
        is_causal: not used: the caller gives this kernel a bias instead.
        head_mask: [N], or any shape that broadcasts to [B, N, T, S].

    Returns:
        Context [B, N, T, H] and weights [B, N, T, S] (after the head mask, before dropout).
    """
    scores = _seeing(query, bias) @ key.transpose(2, 3)  # [B, N, T, S]
    if bias is not None:
        scores = scores + bias.values
    # Softmax in float32 whenever the activations have 16 bits.
    weights = F.softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype)).to(value.dtype)
    if head_mask is not None:
        weights = weights * head_mask.to(weights.dtype)
    context = F.dropout(weights, dropout) @ value if dropout else weights @ value  # [B, N, T, H]
    return context, weights


def sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    is_causal: bool,
    head_mask: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """PyTorch's fused attention; arguments and results as `eager_attention`, without weights."""
    context = F.scaled_dot_product_attention(
        _seeing(query, bias),
        key,
        value,
        attn_mask=None if bias is None else bias.values,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=1.0,
    )
    return context, None


def _seeing(query: Tensor, bias: Bias | None) -> Tensor:
    """The query with 0 where it may see no key."""
    if bias is None or bias.blind is None:
        return query
    return query.masked_fill(bias.blind, 0)


AttentionKernel = Callable[..., tuple[Tensor, Tensor | None]]
KERNELS: Mapping[str, Kernel] = {
    "eager": Kernel(eager_attention, shows_weights=True, masks_heads=True, drops=True),
    "sdpa": Kernel(sdpa_attention, drops=True, is_causal=True),
    "flash_attention_2": Kernel(flash_attention, drops=True, packs=True, can_pack=can_pack),
}
DEFAULT_KERNEL = "sdpa"


class OPTAttention(nn.Module):
    """Self-attention of one layer."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.scaling = self.head_dim**-0.5
        size, bias = config.hidden_size, config.enable_bias
        self.q_proj = Linear(size, size, bias=bias)
        self.k_proj = Linear(size, size, bias=bias)
        self.v_proj = Linear(size, size, bias=bias)
        self.out_proj = Linear(size, size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        kernel: AttentionKernel,
        bias: Bias | Packed | None = None,
        is_causal: bool = False,
        head_mask: Tensor | None = None,
        past: LayerCache | None = None,
        past_length: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, LayerCache]:
        """[B, T, D] -> output [B, T, D], weights [B, N, T, S] or None, the extended cache."""
        # The query is scaled after its bias and before the product.
        query = self._split_heads(self.q_proj(hidden_states) * self.scaling)  # [B, N, T, H]
        key = self._split_heads(self.k_proj(hidden_states))  # [B, N, T, H]
        value = self._split_heads(self.v_proj(hidden_states))  # [B, N, T, H]

        cache = LayerCache(key, value)
        if past is not None:
            cache = past.extended(key, value, past_length)
            key, value = cache.key, cache.value  # [B, N, S, H]
            if isinstance(past_length, int):
                used = past_length + query.shape[2]
                key, value = key[:, :, :used], value[:, :, :used]

        dropout = self.dropout if self.training else 0.0
        context, weights = kernel(query, key, value, bias, is_causal, head_mask, dropout)
        output = self.out_proj(self._join_heads(context))  # [B, T, D]
        return output, weights, cache

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # -> [B, N, T, H]

    def _join_heads(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)  # -> [B, T, D]
