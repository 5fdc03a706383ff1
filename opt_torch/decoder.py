# SPDX-License-Identifier: Apache-2.0
"""The decoder: embeddings, layers, the final norm."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opt_core import OPTConfig
from opt_core.inputs import check_call, check_ids, check_positions
from opt_core.params import has_final_norm, projects_embeddings
from opt_torch.attention import DEFAULT_KERNEL, KERNELS, AttentionKernel
from opt_torch.cache import KVCache, LayerCache
from opt_torch.flash import Packed, can_pack, pack
from opt_torch.layers import OPTDecoderLayer, OPTLearnedPositionalEmbedding, layer_norm
from opt_torch.masks import Bias, attention_bias, packed_texts, positions_from_mask, without_effect
from opt_torch.outputs import BaseModelOutput
from opt_torch.parts import Embedding, Linear, is_readable


class OPTDecoder(nn.Module):
    """Token and position embeddings, the layers, the final norm."""

    def __init__(self, config: OPTConfig, attn_implementation: str = DEFAULT_KERNEL) -> None:
        super().__init__()
        self.config = config
        self.attn_implementation = attn_implementation
        self.layerdrop = config.layerdrop
        self.gradient_checkpointing = False
        embed = config.word_embed_proj_dim
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
        config = self.config
        recomputes = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        use_cache = self._use_cache(use_cache, config.use_cache, recomputes)
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict
        past = None
        if past_key_values is not None:
            rows = inputs_embeds if input_ids is None else input_ids
            past = KVCache.from_pairs(past_key_values, None if rows is None else rows.device)
        self._check(input_ids, inputs_embeds, attention_mask, position_ids, head_mask, past)
        past_length = 0 if past is None else past.used

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # [B, T, E]
        length = inputs_embeds.shape[1]
        # A query of a compiled program runs over all columns; the bias hides those not in use.
        total = past.capacity if isinstance(past_length, Tensor) else past_length + length
        if attention_mask is not None:  # of a fixed cache: longer
            attention_mask = F.pad(attention_mask, (0, total - attention_mask.shape[1]))
            # With a past there is a bias anyway, but for one kernel; others need not wait to know.
            begins = isinstance(past_length, int) and past_length == 0
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
        hidden_states = self._embed(inputs_embeds, position_ids)
        is_whole = attention_mask is None and texts is None
        kernel = self._kernel(output_attentions, head_mask, is_whole, past_length)
        bias, is_causal = self._bias(
            kernel, attention_mask, hidden_states, past_length, total, texts
        )
        hidden_states, cache, all_hidden_states, all_attentions = self._run_layers(
            hidden_states,
            kernel,
            bias,
            is_causal,
            head_mask,
            past,
            recomputes,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        output = BaseModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=all_hidden_states if output_hidden_states else None,
            attentions=all_attentions if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()

    def _embed(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """[B, T, E] -> [B, T, D]"""
        hidden_states = inputs_embeds
        if self.project_in is not None:
            hidden_states = self.project_in(hidden_states)
        return hidden_states + self.embed_positions(position_ids)

    def _run_layers(
        self,
        hidden_states: Tensor,
        kernel: AttentionKernel,
        bias: Bias | Packed | None,
        is_causal: bool,
        head_mask: Tensor | None,
        past: KVCache | None,
        recomputes: bool,
        use_cache: bool,
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> tuple[Tensor, KVCache, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Returns the output [B, T, E], the cache, every layer's input and attention weights.

        What is not asked for is not kept: its memory serves the next layer.
        """
        all_hidden_states: tuple[Tensor, ...] = ()
        all_attentions: tuple[Tensor, ...] = ()
        caches: tuple[LayerCache, ...] = ()
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            if self.training and self.layerdrop and torch.rand([]) < self.layerdrop:
                continue
            run = partial(checkpoint, layer, use_reentrant=False) if recomputes else layer
            hidden_states, weights, cache = run(
                hidden_states,
                kernel,
                bias,
                is_causal,
                None if head_mask is None else head_mask[index][:, None, None],  # [N, 1, 1]
                None if past is None else past.layers[index],
                None if past is None else past.length,
            )
            if use_cache:
                caches += (cache,)
            if output_attentions and weights is not None:
                all_attentions += (weights,)
        length = hidden_states.shape[1]
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        if self.project_out is not None:
            hidden_states = self.project_out(hidden_states)
        all_hidden_states += (hidden_states,)
        return (
            hidden_states,
            KVCache(caches) if past is None else past.advanced(caches, length),
            all_hidden_states,
            all_attentions,
        )

    def _use_cache(self, use_cache: bool | None, default: bool, recomputes: bool) -> bool:
        if recomputes and use_cache:
            _warn_once(
                "use_cache",
                "Gradient checkpointing keeps no keys and values in training: use_cache=True has no "
                "effect there (said once).",
            )
        return not recomputes and (default if use_cache is None else use_cache)

    def _bias(
        self,
        kernel: AttentionKernel,
        attention_mask: Tensor | None,
        hidden_states: Tensor,
        past_length: int | Tensor,
        total: int,
        texts: Tensor | None,
    ) -> tuple[Bias | Packed | None, bool]:
        """The bias and the causal flag that the kernel needs, as few as possible.

        FlashAttention takes no bias, but where the real tokens are.
        """
        batch_size, length = hidden_states.shape[:2]
        if kernel is KERNELS["flash_attention_2"]:
            return pack(attention_mask, texts, batch_size, length), length > 1
        if attention_mask is None and texts is None and not isinstance(past_length, Tensor):
            if length == 1:  # one query sees all keys
                return None, False
            if past_length == 0 and kernel is not KERNELS["eager"]:
                return None, True
        dtype, device = hidden_states.dtype, hidden_states.device
        bias = attention_bias(attention_mask, length, total, past_length, dtype, device, texts)
        return bias, False

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

    def _kernel(
        self,
        output_attentions: bool,
        head_mask: Tensor | None,
        is_whole: bool,
        past_length: int | Tensor,
    ) -> AttentionKernel:
        if (output_attentions or head_mask is not None) and self.attn_implementation != "eager":
            _warn_once(
                self.attn_implementation,
                f"attn_implementation={self.attn_implementation!r} neither shows attention weights nor "
                "masks heads: such calls run 'eager' instead (said once).",
            )
            return KERNELS["eager"]
        if self.attn_implementation == "flash_attention_2":
            if isinstance(past_length, Tensor):  # a compiled program packs nothing
                return KERNELS["sdpa"]
            dropout = self.config.attention_dropout if self.training else 0.0
            if not is_whole and not can_pack(dropout):
                _warn_once(
                    "packing",
                    "PyTorch's FlashAttention-2 has no dropout for rows with pads or several texts (or "
                    "is older than 2.10): such calls run 'sdpa' instead (said once). The flash_attn "
                    "package has it.",
                )
                return KERNELS["sdpa"]
        return KERNELS[self.attn_implementation]

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


_told: set[str] = set()


def _warn_once(what: str, message: str) -> None:
    if what not in _told and not torch.compiler.is_compiling():
        _told.add(what)
        warnings.warn(message, stacklevel=2)
