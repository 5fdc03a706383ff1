# SPDX-License-Identifier: Apache-2.0
"""The decoder: embeddings, layers, the final norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opt_core import OPTConfig
from opt_core.calls import Asked, BiasKind, CallPlan, Facts, plan_call, tell_once
from opt_core.inputs import check_call, check_ids, check_positions
from opt_core.params import has_final_norm, projects_embeddings
from opt_torch.attention import DEFAULT_KERNEL, KERNELS
from opt_torch.cache import KVCache, LayerCache
from opt_torch.flash import Packed, pack
from opt_torch.layers import OPTDecoderLayer, OPTLearnedPositionalEmbedding, layer_norm
from opt_torch.masks import Bias, attention_bias, packed_texts, positions_from_mask, without_effect
from opt_torch.outputs import BaseModelOutput
from opt_torch.parts import Embedding, Linear, is_readable, own_layers


class OPTDecoder(nn.Module):
    """Token and position embeddings, the layers, the final norm."""

    def __init__(self, config: OPTConfig, attn_implementation: str = DEFAULT_KERNEL) -> None:
        super().__init__()
        self.config = config
        self.attn_implementation = attn_implementation
        self.layerdrop = config.layerdrop
        self.gradient_checkpointing = False
        embed = config.word_embed_proj_dim
        with own_layers():
            self.embed_tokens = Embedding(config.vocab_size, embed, config.pad_token_id)
            self.embed_positions = OPTLearnedPositionalEmbedding(config)
            # opt-350m has narrower word embeddings, projected to the hidden size and back.
            self.project_in: nn.Linear | None = None
            self.project_out: nn.Linear | None = None
            if projects_embeddings(config):
                self.project_in = Linear(embed, config.hidden_size, bias=False)
                self.project_out = Linear(config.hidden_size, embed, bias=False)
            # No final norm in a post-norm model, nor where `_remove_final_layer_norm` says so.
            self.final_layer_norm = layer_norm(config) if has_final_norm(config) else None
            self.layers = nn.ModuleList(
                OPTDecoderLayer(config) for _ in range(config.num_hidden_layers)
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Arguments and result as `OPTModel.forward`."""
        past = None
        if past_key_values is not None:
            rows = inputs_embeds if input_ids is None else input_ids
            past = KVCache.from_pairs(past_key_values, None if rows is None else rows.device)
        self._check(input_ids, inputs_embeds, attention_mask, position_ids, head_mask, past)
        past_length = 0 if past is None else past.used
        has_room = isinstance(past_length, Tensor)

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # [B, T, E]
        length = inputs_embeds.shape[1]
        # A query of a compiled program runs over all columns; the bias hides those not in use.
        total = past.capacity if isinstance(past_length, Tensor) else past_length + length
        if attention_mask is not None:  # of a fixed cache: longer
            attention_mask = F.pad(attention_mask, (0, total - attention_mask.shape[1]))
            # With a past there is a bias anyway, but for one kernel; others need not wait to know.
            begins = not has_room and past_length == 0
            asks = length > 1 and (begins or self.attn_implementation == "flash_attention_2")
            if asks and without_effect(attention_mask):
                attention_mask = None
        texts = None
        if position_ids is not None and past is None:
            texts = packed_texts(position_ids)
        if position_ids is None:
            position_ids = self._positions(
                attention_mask, length, past_length, inputs_embeds.device
            )
        plan = plan_call(
            self.config,
            KERNELS,
            self.attn_implementation,
            Asked(use_cache, output_attentions, output_hidden_states, return_dict),
            Facts(
                length=length,
                has_past=isinstance(past_length, Tensor) or past_length != 0,
                has_room=has_room,
                hides=attention_mask is not None,
                has_texts=texts is not None,
                masks_heads=head_mask is not None,
                trains=self.training,
                recomputes=self.gradient_checkpointing
                and self.training
                and torch.is_grad_enabled(),
            ),
        )
        if not torch.compiler.is_compiling():
            tell_once(plan)
        hidden_states = self._embed(inputs_embeds, position_ids)
        bias = self._bias(plan.bias, attention_mask, hidden_states, past_length, total, texts)
        output = self._run_layers(plan, hidden_states, bias, head_mask, past)
        return output if plan.return_dict else output.to_tuple()

    def _embed(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """[B, T, E] -> [B, T, D]"""
        hidden_states = inputs_embeds
        if self.project_in is not None:
            hidden_states = self.project_in(hidden_states)
        return hidden_states + self.embed_positions(position_ids)

    def _run_layers(
        self,
        plan: CallPlan,
        hidden_states: Tensor,
        bias: Bias | Packed | None,
        head_mask: Tensor | None,
        past: KVCache | None,
    ) -> BaseModelOutput:
        """The output [B, T, E], and what the plan asks for: the cache, every layer's input and weights.

        What is not asked for is not kept: its memory serves the next layer.
        """
        all_hidden_states: tuple[Tensor, ...] = ()
        all_attentions: tuple[Tensor, ...] = ()
        caches: tuple[LayerCache, ...] = ()
        for index, layer in enumerate(self.layers):
            if plan.output_hidden_states:
                all_hidden_states += (hidden_states,)
            if self.training and self.layerdrop and torch.rand([]) < self.layerdrop:
                continue
            run = partial(checkpoint, layer, use_reentrant=False) if plan.recomputes else layer
            hidden_states, weights, cache = run(
                hidden_states,
                plan.kernel.function,
                bias,
                plan.is_causal,
                None if head_mask is None else head_mask[index][:, None, None],  # [N, 1, 1]
                None if past is None else past.layers[index],
                None if past is None else past.length,
            )
            if plan.use_cache:
                caches += (cache,)
            if plan.output_attentions and weights is not None:
                all_attentions += (weights,)
        length = hidden_states.shape[1]
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        if self.project_out is not None:
            hidden_states = self.project_out(hidden_states)
        all_hidden_states += (hidden_states,)
        cache = None
        if plan.use_cache:
            cache = KVCache(caches) if past is None else past.advanced(caches, length)
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=cache,
            hidden_states=all_hidden_states if plan.output_hidden_states else None,
            attentions=all_attentions if plan.output_attentions else None,
        )

    def _bias(
        self,
        kind: BiasKind,
        attention_mask: Tensor | None,
        hidden_states: Tensor,
        past_length: int | Tensor,
        total: int,
        texts: Tensor | None,
    ) -> Bias | Packed | None:
        """What tells the kernel which keys are hidden."""
        batch_size, length = hidden_states.shape[:2]
        if kind is BiasKind.PACKED:
            return pack(attention_mask, texts, batch_size, length)
        if kind is BiasKind.FULL:
            dtype, device = hidden_states.dtype, hidden_states.device
            return attention_bias(attention_mask, length, total, past_length, dtype, device, texts)
        return None

    def _positions(
        self,
        attention_mask: Tensor | None,
        length: int,
        past_length: int | Tensor,
        device: torch.device,
    ) -> Tensor:
        """[B or 1, T]. Positions count a row's real tokens, so padding on the left shifts none."""
        if attention_mask is not None:
            return positions_from_mask(attention_mask, past_length, length)
        return past_length + torch.arange(length, device=device)[None]

    def _check(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        head_mask: Tensor | None,
        past: KVCache | None,
    ) -> None:
        check_call(
            self.config,
            input_ids=None if input_ids is None else input_ids.shape,
            inputs_embeds=None if inputs_embeds is None else inputs_embeds.shape,
            attention_mask=None if attention_mask is None else attention_mask.shape,
            position_ids=None if position_ids is None else position_ids.shape,
            head_mask=None if head_mask is None else head_mask.shape,
            past=None if past is None else past.shapes(),
        )
        # The values can be looked at only where that costs no graph break and no synchronisation.
        if input_ids is not None and is_readable(input_ids):
            check_ids(int(input_ids.min()), int(input_ids.max()), self.config.vocab_size)
        if position_ids is not None and is_readable(position_ids):
            limit = self.config.max_position_embeddings
            check_positions(int(position_ids.min()), int(position_ids.max()), limit)
