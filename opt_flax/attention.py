# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention, and the kernels that it can run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from opt_core import OPTConfig, UnsupportedError
from opt_core.calls import Kernel
from opt_flax.cache import LayerCache
from opt_flax.masks import Bias
from opt_flax.parts import linear

Dropout = Callable[[Array], Array]
CUDNN_BACKENDS = ("gpu",)
CUDNN_DTYPES = (jnp.float16, jnp.bfloat16)


def eager_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Bias | None,
    is_causal: bool,
    head_mask: Array | None,
    dropout: Dropout | None,
) -> tuple[Array, Array | None]:
    """Attention in plain operations, the only kernel that shows its weights and masks heads.

    Args:
        query: [B, N, T, H], already scaled.
        key, value: [B, N, S, H].
        bias: which keys are hidden from which queries; None where none is.
        is_causal: not used: the caller gives this kernel a bias instead.
        head_mask: [N], or any shape that broadcasts to [B, N, T, S].
        dropout: drops attention weights [B, N, T, S]; None drops none.

    Returns:
        Context [B, N, T, H] and weights [B, N, T, S] (after the head mask, before dropout).
    """
    scores = _seeing(query, bias) @ key.swapaxes(2, 3)  # [B, N, T, S]
    if bias is not None:
        scores = scores + bias.values
    # Softmax in float32 whenever the activations have 16 bits.
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    if head_mask is not None:
        weights = weights * head_mask.astype(weights.dtype)
    context = (weights if dropout is None else dropout(weights)) @ value  # [B, N, T, H]
    return context, weights


def sdpa_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Bias | None,
    is_causal: bool,
    head_mask: Array | None,
    dropout: Dropout | None,
) -> tuple[Array, Array | None]:
    """JAX's fused attention; arguments and results as `eager_attention`, without weights."""
    return _fused_attention(query, key, value, bias, is_causal, "xla"), None


def cudnn_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Bias | None,
    is_causal: bool,
    head_mask: Array | None,
    dropout: Dropout | None,
) -> tuple[Array, Array | None]:
    """CuDNN's FlashAttention, on a GPU and in 16 bits; arguments and results as `sdpa_attention`.

    Raises:
        UnsupportedError: no GPU, or another dtype.
    """
    backend, dtype = jax.default_backend(), query.dtype
    if backend not in CUDNN_BACKENDS or dtype not in CUDNN_DTYPES:
        raise UnsupportedError(
            "attn_implementation='cudnn': expected a GPU, and float16 or bfloat16; found "
            f"{backend} and {dtype}. Load the model with dtype='bfloat16' there, or use 'eager'."
        )
    return _fused_attention(query, key, value, bias, is_causal, "cudnn"), None


def _fused_attention(
    query: Array, key: Array, value: Array, bias: Bias | None, is_causal: bool, by: str
) -> Array:
    """[B, N, T, H]"""
    query = _seeing(query, bias)
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # [B, T or S, N, H]
    values = None if bias is None else bias.values
    context = jax.nn.dot_product_attention(
        query, key, value, values, is_causal=is_causal, scale=1.0, implementation=by
    )
    return context.swapaxes(1, 2)


def _seeing(query: Array, bias: Bias | None) -> Array:
    """The query with 0 where it may see no key."""
    if bias is None or bias.blind is None:
        return query
    return jnp.where(bias.blind, 0, query)


AttentionKernel = Callable[..., tuple[Array, Array | None]]
KERNELS: Mapping[str, Kernel] = {
    "eager": Kernel(eager_attention, shows_weights=True, masks_heads=True, drops=True),
    "sdpa": Kernel(sdpa_attention, is_causal=True),
    "cudnn": Kernel(cudnn_attention, is_causal=True),
}
DEFAULT_KERNEL = "eager"


class OPTAttention(nn.Module):
    """Self-attention of one layer."""

    config: OPTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.dropout = nn.Dropout(config.attention_dropout)
        self.scaling = self.head_dim**-0.5
        size, bias = config.hidden_size, config.enable_bias
        numbers = (config.init_std, self.dtype, self.param_dtype)
        self.q_proj = linear(size, *numbers, bias=bias)
        self.k_proj = linear(size, *numbers, bias=bias)
        self.v_proj = linear(size, *numbers, bias=bias)
        self.out_proj = linear(size, *numbers, bias=bias)

    def __call__(
        self,
        hidden_states: Array,
        kernel: AttentionKernel,
        bias: Bias | None = None,
        is_causal: bool = False,
        head_mask: Array | None = None,
        past: LayerCache | None = None,
        past_length: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Array | None, LayerCache]:
        """[B, T, D] -> output [B, T, D], weights [B, N, T, S] or None, the extended cache."""
        # The query is scaled after its bias and before the product.
        query = self._split_heads(self.q_proj(hidden_states) * self.scaling)  # [B, N, T, H]
        key = self._split_heads(self.k_proj(hidden_states))  # [B, N, T, H]
        value = self._split_heads(self.v_proj(hidden_states))  # [B, N, T, H]

        cache = LayerCache(key, value)
        if past is not None:
            cache = past.extended(key, value, past_length)
            key, value = cache.key, cache.value  # [B, N, S, H], whole buffers of a fixed cache

        drops = not deterministic and self.config.attention_dropout > 0
        dropout = partial(self.dropout, deterministic=False) if drops else None
        context, weights = kernel(query, key, value, bias, is_causal, head_mask, dropout)
        output = self.out_proj(self._join_heads(context))  # [B, T, D]
        return output, weights, cache

    def _split_heads(self, x: Array) -> Array:
        x = x.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
        return x.swapaxes(1, 2)  # -> [B, N, T, H]

    def _join_heads(self, x: Array) -> Array:
        x = x.swapaxes(1, 2)
        return x.reshape(*x.shape[:-2], -1)  # -> [B, T, D]
