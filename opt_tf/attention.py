# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention, and the kernels that it can run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core import OPTConfig
from opt_core.calls import Kernel
from opt_tf.cache import LayerCache
from opt_tf.masks import Bias
from opt_tf.parts import at_least_float32, in_float32, linear
from opt_tf.parts import dropout as drop


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    is_causal: bool,
    head_mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention in plain operations, the only kernel that shows its weights and masks heads.

    Args:
        query: [B, N, T, H], already scaled.
        key, value: [B, N, S, H].
        bias: which keys are hidden from which queries; None where none is.
        is_causal: not used: the caller gives this kernel a bias instead.
        head_mask: [N], or any shape that broadcasts to [B, N, T, S].
        seed: of the dropout; None for none.

    Returns:
        Context [B, N, T, H] and weights [B, N, T, S] (after the head mask, before dropout).
    """
    scores = tf.matmul(_seeing(query, bias), key, transpose_b=True)  # [B, N, T, S]
    if bias is not None:
        scores = scores + bias.values
    # Softmax in float32 whenever the activations have 16 bits.
    weights = tf.nn.softmax(tf.cast(scores, at_least_float32(scores.dtype)))
    weights = tf.cast(weights, value.dtype)
    if head_mask is not None:
        weights = weights * tf.cast(head_mask, weights.dtype)
    context = tf.matmul(drop(weights, dropout, seed), value)  # [B, N, T, H]
    return context, weights


def sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    is_causal: bool,
    head_mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Keras' attention; arguments and results as `eager_attention`, without dropout and weights."""
    query = _seeing(query, bias)
    query, key, value = (_swap_axes(x) for x in (query, key, value))  # [B, T or S, N, H]
    values = None if bias is None else bias.values
    context = keras.ops.dot_product_attention(
        query, key, value, bias=values, scale=1.0, is_causal=is_causal
    )
    return _swap_axes(context), None


def _seeing(query: Tensor, bias: Bias | None) -> Tensor:
    """The query with 0 where it may see no key."""
    if bias is None or bias.blind is None:
        return query
    return tf.where(bias.blind, tf.zeros((), query.dtype), query)


def _swap_axes(x: Tensor) -> Tensor:
    return tf.transpose(x, (0, 2, 1, 3))  # [B, T or S, N, H] <-> [B, N, T or S, H]


AttentionKernel = Callable[..., tuple[Tensor, Tensor | None]]
KERNELS: Mapping[str, Kernel] = {
    "eager": Kernel(eager_attention, shows_weights=True, masks_heads=True, drops=True),
    "sdpa": Kernel(sdpa_attention, is_causal=True),
}
DEFAULT_KERNEL = "eager"


class OPTAttention(keras.layers.Layer):
    """Self-attention of one layer."""

    def __init__(self, config: OPTConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.scaling = self.head_dim**-0.5
        size, bias, dtype = config.hidden_size, config.enable_bias, self.dtype_policy
        self.q_proj = linear(size, "q_proj", dtype, bias=bias)
        self.k_proj = linear(size, "k_proj", dtype, bias=bias)
        self.v_proj = linear(size, "v_proj", dtype, bias=bias)
        self.out_proj = linear(size, "out_proj", dtype, bias=bias)

    def build(self, input_shape: Any = None) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            projection.build((None, self.num_heads * self.head_dim))

    def call(
        self,
        hidden_states: Tensor,
        kernel: AttentionKernel,
        bias: Bias | None = None,
        is_causal: bool = False,
        head_mask: Tensor | None = None,
        past: LayerCache | None = None,
        past_length: int | Tensor | None = None,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, LayerCache]:
        """[B, T, D] -> output [B, T, D], weights [B, N, T, S] or None, the extended cache."""
        # The query is scaled after its bias and before the product.
        query = in_float32(lambda x: x * self.scaling)(self.q_proj(hidden_states))
        query = self._split_heads(query)  # [B, N, T, H]
        key = self._split_heads(self.k_proj(hidden_states))  # [B, N, T, H]
        value = self._split_heads(self.v_proj(hidden_states))  # [B, N, T, H]

        cache = LayerCache(key, value)
        if past is not None:
            cache = past.extended(key, value, past_length)
            key, value = cache.key, cache.value  # [B, N, S, H]
            if isinstance(past_length, int):
                used = past_length + keras.ops.shape(query)[2]
                key, value = key[:, :, :used], value[:, :, :used]

        context, weights = kernel(query, key, value, bias, is_causal, head_mask, self.dropout, seed)
        output = self.out_proj(self._join_heads(context))  # [B, T, D]
        return output, weights, cache

    def _split_heads(self, x: Tensor) -> Tensor:
        batch, length, _ = keras.ops.shape(x)
        x = tf.reshape(x, (batch, length, self.num_heads, self.head_dim))
        return _swap_axes(x)  # -> [B, N, T, H]

    def _join_heads(self, x: Tensor) -> Tensor:
        batch, _, length, _ = keras.ops.shape(x)
        return tf.reshape(
            _swap_axes(x), (batch, length, self.num_heads * self.head_dim)
        )  # -> [B, T, D]
