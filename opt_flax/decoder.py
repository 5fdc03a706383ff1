# SPDX-License-Identifier: Apache-2.0
"""The decoder: embeddings, layers, the final norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from opt_core import OPTConfig
from opt_core.calls import Asked, BiasKind, CallPlan, Facts, plan_call, tell_once
from opt_core.inputs import check_call, check_ids, check_positions
from opt_core.params import POSITION_OFFSET, Kind, has_final_norm, projects_embeddings
from opt_flax.attention import DEFAULT_KERNEL, KERNELS
from opt_flax.cache import KVCache, LayerCache
from opt_flax.layers import OPTDecoderLayer, OPTLearnedPositionalEmbedding, layer_norm
from opt_flax.masks import Bias, attention_bias, packed_texts, positions_from_mask
from opt_flax.outputs import BaseModelOutput
from opt_flax.parts import Embed, is_readable, linear, recomputed, still_pads
from opt_flax.weights import initializer


class OPTDecoderLayers(nn.Module):
    """Holds the layers, so that they are named 0, 1, ... below `layers`."""

    config: OPTConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        self.items = [
            OPTDecoderLayer(self.config, self.dtype, self.param_dtype, name=str(index))
            for index in range(self.config.num_hidden_layers)
        ]


class OPTDecoder(nn.Module):
    """Token and position embeddings, the layers, the final norm."""

    config: OPTConfig
    attn_implementation: str = DEFAULT_KERNEL
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self) -> None:
        config, dtypes = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        numbers = (config.init_std, *dtypes.values())
        draw = partial(initializer, Kind.EMBEDDING, config.init_std)
        self.layerdrop = config.layerdrop
        embed = config.word_embed_proj_dim
        self.embed_tokens = Embed(
            config.vocab_size, embed, embedding_init=draw(config.pad_token_id), **dtypes
        )
        self.embed_positions = OPTLearnedPositionalEmbedding(
            config.max_position_embeddings + POSITION_OFFSET,
            config.hidden_size,
            embedding_init=draw(),
            **dtypes,
        )
        # opt-350m has narrower word embeddings, projected to the hidden size and back.
        self.project_in = self.project_out = None
        if projects_embeddings(config):
            self.project_in = linear(config.hidden_size, *numbers, bias=False)
            self.project_out = linear(embed, *numbers, bias=False)
        # No final norm in a post-norm model, nor where `_remove_final_layer_norm` says so.
        self.final_layer_norm = layer_norm(config, **dtypes) if has_final_norm(config) else None
        self.layers = OPTDecoderLayers(config, **dtypes)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        head_mask: Array | None = None,
        past_key_values: Any = None,
        inputs_embeds: Array | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Array | None = None,
        deterministic: bool = True,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Arguments and result as `OPTModule`."""
        config = self.config
        past = None if past_key_values is None else KVCache.from_pairs(past_key_values)
        self._check(input_ids, inputs_embeds, attention_mask, position_ids, head_mask, past)
        past_length = 0 if past is None else past.used
        has_room = past is not None and past.length is not None

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # [B, T, E]
            inputs_embeds = still_pads(inputs_embeds, input_ids, config.pad_token_id)
        length = inputs_embeds.shape[1]
        # A query runs over all columns of a fixed cache; the bias hides those not in use.
        total = length if past is None else past.capacity if has_room else length + past.capacity
        if attention_mask is not None:
            attention_mask = jnp.pad(attention_mask, ((0, 0), (0, total - attention_mask.shape[1])))
        texts = None
        if position_ids is not None and past is None:
            texts = packed_texts(position_ids)
        if position_ids is None:
            position_ids = self._positions(attention_mask, length, past_length)
        plan = plan_call(
            config,
            KERNELS,
            self.attn_implementation,
            Asked(use_cache, output_attentions, output_hidden_states, return_dict),
            Facts(
                length=length,
                has_past=past is not None,
                has_room=has_room,
                hides=attention_mask is not None,
                has_texts=texts is not None,
                masks_heads=head_mask is not None,
                trains=not deterministic,
                recomputes=self.gradient_checkpointing
                and not (deterministic or self.is_initializing()),
                keeps_cache=past is not None,  # as in the reference
            ),
        )
        tell_once(plan)
        hidden_states = self._embed(inputs_embeds, position_ids)
        bias = self._bias(plan.bias, attention_mask, hidden_states, past_length, total, texts)
        output = self._run_layers(plan, hidden_states, bias, head_mask, past, deterministic)
        return output if plan.return_dict else output.to_tuple()

    def _embed(self, inputs_embeds: Array, position_ids: Array) -> Array:
        """[B, T, E] -> [B, T, D]"""
        hidden_states = inputs_embeds.astype(self.dtype)
        if self.project_in is not None:
            hidden_states = self.project_in(hidden_states)
        return hidden_states + self.embed_positions(position_ids)

    def _run_layers(
        self,
        plan: CallPlan,
        hidden_states: Array,
        bias: Bias | None,
        head_mask: Array | None,
        past: KVCache | None,
        deterministic: bool,
    ) -> BaseModelOutput:
        """The output [B, T, E], and what the plan asks for: the cache, every layer's input and weights.

        What is not asked for is not kept: its memory serves the next layer.
        """
        all_hidden_states: tuple[Array, ...] = ()
        all_attentions: tuple[Array, ...] = ()
        caches: tuple[LayerCache, ...] = ()
        for index, layer in enumerate(self.layers.items):
            if plan.output_hidden_states:
                all_hidden_states += (hidden_states,)
            residual = hidden_states
            run = partial(recomputed, layer) if plan.recomputes else layer
            hidden_states, weights, cache = run(
                hidden_states,
                plan.kernel.function,
                bias,
                plan.is_causal,
                None if head_mask is None else head_mask[index][:, None, None],  # [N, 1, 1]
                None if past is None else past.layers[index],
                None if past is None else past.length,
                deterministic,
            )
            if self.layerdrop and not deterministic:
                # What a compiled program returns is fixed: a dropped layer shows weights and cache.
                dropped = jax.random.uniform(self.make_rng("dropout")) < self.layerdrop
                hidden_states = jnp.where(dropped, residual, hidden_states)
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
        attention_mask: Array | None,
        hidden_states: Array,
        past_length: int | Array,
        total: int,
        texts: Array | None,
    ) -> Bias | None:
        """What tells the kernel which keys are hidden."""
        length = hidden_states.shape[1]
        if kind is BiasKind.FULL:
            dtype = hidden_states.dtype
            return attention_bias(attention_mask, length, total, past_length, dtype, texts)
        return None

    def _positions(
        self, attention_mask: Array | None, length: int, past_length: int | Array
    ) -> Array:
        """[B or 1, T]. Positions count a row's real tokens, so padding on the left shifts none."""
        if attention_mask is not None:
            return positions_from_mask(attention_mask, past_length, length)
        return past_length + jnp.arange(length)[None]

    def _check(
        self,
        input_ids: Array | None,
        inputs_embeds: Array | None,
        attention_mask: Array | None,
        position_ids: Array | None,
        head_mask: Array | None,
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
        # The values can be looked at only where nothing is traced and no device is waited for.
        if input_ids is not None and is_readable(input_ids) and input_ids.size:
            ids = np.asarray(input_ids)
            check_ids(int(ids.min()), int(ids.max()), self.config.vocab_size)
        if position_ids is not None and is_readable(position_ids) and position_ids.size:
            positions, limit = np.asarray(position_ids), self.config.max_position_embeddings
            check_positions(int(positions.min()), int(positions.max()), limit)
