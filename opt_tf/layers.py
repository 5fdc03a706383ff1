# SPDX-License-Identifier: Apache-2.0
"""The parts of the decoder: the position table and the layer."""

from __future__ import annotations

from typing import Any

import keras
from tensorflow import Tensor

from opt_core import OPTConfig
from opt_core.params import LAYER_NORM_EPS, POSITION_OFFSET
from opt_tf.activations import ACTIVATIONS
from opt_tf.attention import AttentionKernel, OPTAttention
from opt_tf.cache import LayerCache
from opt_tf.masks import Bias
from opt_tf.parts import FirstValue, dropout, existing_rows, in_float32, linear, split_seed


class OPTLearnedPositionalEmbedding(keras.layers.Embedding):
    """The position table. Two rows stand before position 0: pads (-1) read row 1, none reads row 0."""

    def __init__(self, config: OPTConfig, **kwargs: Any) -> None:
        rows = config.max_position_embeddings + POSITION_OFFSET
        super().__init__(rows, config.hidden_size, embeddings_initializer=FirstValue(), **kwargs)

    def call(self, positions: Tensor) -> Tensor:
        """[B, T] positions from -1 on -> [B, T, D]."""
        rows = positions + POSITION_OFFSET
        return existing_rows(super().call(rows), rows, self.input_dim)


def layer_norm(config: OPTConfig, name: str, dtype: Any) -> keras.layers.LayerNormalization:
    return keras.layers.LayerNormalization(
        epsilon=LAYER_NORM_EPS,
        center=config.layer_norm_elementwise_affine,
        scale=config.layer_norm_elementwise_affine,
        beta_initializer=FirstValue(),
        gamma_initializer=FirstValue(),
        name=name,
        dtype=dtype,
    )


class OPTDecoderLayer(keras.layers.Layer):
    """Attention and feed-forward, each with a residual connection and a layer norm."""

    def __init__(self, config: OPTConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden_size = config.hidden_size
        self.do_layer_norm_before = config.do_layer_norm_before
        self.dropout = config.dropout
        self.activation = in_float32(ACTIVATIONS[config.activation_function])
        dtype = self.dtype_policy
        self.self_attn = OPTAttention(config, name="self_attn", dtype=dtype)
        self.self_attn_layer_norm = layer_norm(config, "self_attn_layer_norm", dtype)
        self.fc1 = linear(config.ffn_dim, "fc1", dtype, bias=config.enable_bias)
        self.fc2 = linear(config.hidden_size, "fc2", dtype, bias=config.enable_bias)
        self.final_layer_norm = layer_norm(config, "final_layer_norm", dtype)

    def build(self, input_shape: Any = None) -> None:
        self.self_attn.build()
        self.self_attn_layer_norm.build((None, self.hidden_size))
        self.fc1.build((None, self.hidden_size))
        self.fc2.build((None, self.fc1.units))
        self.final_layer_norm.build((None, self.hidden_size))

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
        """[B, T, D] -> [B, T, D], weights [B, N, T, S] or None, the extended cache."""
        attention_seed, *seeds = split_seed(seed, 3)
        # opt-350m is post-norm: it normalises after each residual sum; all other sizes before.
        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, weights, cache = self.self_attn(
            hidden_states,
            kernel=kernel,
            bias=bias,
            is_causal=is_causal,
            head_mask=head_mask,
            past=past,
            past_length=past_length,
            seed=attention_seed,
        )
        hidden_states = residual + dropout(hidden_states, self.dropout, seeds[0])
        if not self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)

        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.fc2(self.activation(self.fc1(hidden_states)))  # [B, T, F] inside
        hidden_states = residual + dropout(hidden_states, self.dropout, seeds[1])
        if not self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states, weights, cache
