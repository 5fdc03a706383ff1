# SPDX-License-Identifier: Apache-2.0
"""The parts of the decoder: the position table and the layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from opt_core import OPTConfig
from opt_core.params import LAYER_NORM_EPS, POSITION_OFFSET
from opt_torch.activations import ACTIVATIONS
from opt_torch.attention import AttentionKernel, OPTAttention
from opt_torch.cache import LayerCache
from opt_torch.flash import Packed
from opt_torch.masks import Bias
from opt_torch.parts import Embedding, Linear


class OPTLearnedPositionalEmbedding(Embedding):
    """The position table. Two rows stand before position 0: pads (-1) read row 1, none reads row 0."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__(config.max_position_embeddings + POSITION_OFFSET, config.hidden_size)

    def forward(self, positions: Tensor) -> Tensor:
        """[B, T] positions from -1 on -> [B, T, D]."""
        return super().forward(positions + POSITION_OFFSET)


def layer_norm(config: OPTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(
        config.hidden_size,
        eps=LAYER_NORM_EPS,
        elementwise_affine=config.layer_norm_elementwise_affine,
    )


class OPTDecoderLayer(nn.Module):
    """Attention and feed-forward, each with a residual connection and a layer norm."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.do_layer_norm_before = config.do_layer_norm_before
        self.dropout = config.dropout
        self.activation = ACTIVATIONS[config.activation_function]
        self.self_attn = OPTAttention(config)
        self.self_attn_layer_norm = layer_norm(config)
        self.fc1 = Linear(config.hidden_size, config.ffn_dim, bias=config.enable_bias)
        self.fc2 = Linear(config.ffn_dim, config.hidden_size, bias=config.enable_bias)
        self.final_layer_norm = layer_norm(config)

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
        """[B, T, D] -> [B, T, D], weights [B, N, T, S] or None, the extended cache."""
        # opt-350m is post-norm: it normalises after each residual sum; all other sizes before.
        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states, weights, cache = self.self_attn(
            hidden_states, kernel, bias, is_causal, head_mask, past, past_length
        )
        hidden_states = residual + F.dropout(hidden_states, self.dropout, self.training)
        if not self.do_layer_norm_before:
            hidden_states = self.self_attn_layer_norm(hidden_states)

        residual = hidden_states
        if self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        hidden_states = self.fc2(self.activation(self.fc1(hidden_states)))  # [B, T, F] inside
        hidden_states = residual + F.dropout(hidden_states, self.dropout, self.training)
        if not self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states)
        return hidden_states, weights, cache
