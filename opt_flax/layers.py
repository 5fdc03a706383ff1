# SPDX-License-Identifier: Apache-2.0
"""The parts of the decoder: the position table and the layer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from opt_core import OPTConfig
from opt_core.params import LAYER_NORM_EPS, POSITION_OFFSET
from opt_flax.activations import ACTIVATIONS
from opt_flax.attention import AttentionKernel, OPTAttention
from opt_flax.cache import LayerCache
from opt_flax.masks import Bias
from opt_flax.parts import in_float32, linear


class OPTLearnedPositionalEmbedding(nn.Embed):
    """The position table. Two rows stand before position 0: pads (-1) read row 1, none reads row 0."""

    def __call__(self, positions: Array) -> Array:
        """[B, T] positions from -1 on -> [B, T, D]."""
        return super().__call__(positions + POSITION_OFFSET)


def layer_norm(config: OPTConfig, dtype: Any, param_dtype: Any) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=LAYER_NORM_EPS,
        use_scale=config.layer_norm_elementwise_affine,
        use_bias=config.layer_norm_elementwise_affine,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where the mean is large
        dtype=dtype,
        param_dtype=param_dtype,
    )


class OPTDecoderLayer(nn.Module):
    """Attention and feed-forward, each with a residual connection and a layer norm."""

    config: OPTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        config, dtypes = self.config, (self.dtype, self.param_dtype)
        numbers = (config.init_std, *dtypes)
        self.do_layer_norm_before = config.do_layer_norm_before
        self.dropout = nn.Dropout(config.dropout)
        self.activation = in_float32(ACTIVATIONS[config.activation_function])
        self.self_attn = OPTAttention(config, *dtypes)
        self.self_attn_layer_norm = layer_norm(config, *dtypes)
        self.fc1 = linear(config.ffn_dim, *numbers, bias=config.enable_bias)
        self.fc2 = linear(config.hidden_size, *numbers, bias=config.enable_bias)
        self.final_layer_norm = layer_norm(config, *dtypes)

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
        """[B, T, D] -> [B, T, D], weights [B, N, T, S] or None, the extended cache."""
        # opt-350m is post-norm: it normalises after each residual sum; all other sizes before.
        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, weights, cache = self.self_attn(
            hidden_states, kernel, bias, is_causal, head_mask, past, past_length, deterministic
        )
        hidden_states = residual + self.dropout(hidden_states, deterministic)
        if not self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)

        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.fc2(self.activation(self.fc1(hidden_states)))  # [B, T, F] inside
        hidden_states = residual + self.dropout(hidden_states, deterministic)
        if not self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states, weights, cache
