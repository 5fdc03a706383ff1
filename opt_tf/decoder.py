# SPDX-License-Identifier: Apache-2.0
"""The decoder: embeddings, layers, the final norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core import OPTConfig
from opt_core.calls import Asked, BiasKind, CallPlan, Facts, plan_call, tell_once
from opt_core.params import has_final_norm, projects_embeddings
from opt_tf.attention import DEFAULT_KERNEL, KERNELS
from opt_tf.cache import KVCache, LayerCache
from opt_tf.layers import OPTDecoderLayer, OPTLearnedPositionalEmbedding, layer_norm
from opt_tf.masks import Bias, attention_bias, packed_texts, positions_from_mask
from opt_tf.outputs import BaseModelOutput
from opt_tf.parts import FirstValue, existing_rows, linear, recomputed, still_pads


class OPTDecoder(keras.layers.Layer):
    """Token and position embeddings, the layers, the final norm."""

    def __init__(
        self, config: OPTConfig, attn_implementation: str = DEFAULT_KERNEL, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.attn_implementation = attn_implementation
        self.layerdrop = config.layerdrop
        self.gradient_checkpointing = False
        self.seed_generator = keras.random.SeedGenerator()
        embed, dtype = config.word_embed_proj_dim, self.dtype_policy
        self.embed_tokens = keras.layers.Embedding(
            config.vocab_size, embed, FirstValue(), name="embed_tokens", dtype=dtype
        )
        self.embed_positions = OPTLearnedPositionalEmbedding(
            config, name="embed_positions", dtype=dtype
        )
        # opt-350m has narrower word embeddings, projected to the hidden size and back.
        self.project_in: keras.layers.Dense | None = None
        self.project_out: keras.layers.Dense | None = None
        if projects_embeddings(config):
            self.project_in = linear(config.hidden_size, "project_in", dtype, bias=False)
            self.project_out = linear(embed, "project_out", dtype, bias=False)
        # No final norm in a post-norm model, nor where `_remove_final_layer_norm` says so.
        self.final_layer_norm: keras.layers.LayerNormalization | None = None
        if has_final_norm(config):
            self.final_layer_norm = layer_norm(config, "final_layer_norm", dtype)
        self.layers = [
            OPTDecoderLayer(config, name=f"layers.{index}", dtype=dtype)
            for index in range(config.num_hidden_layers)
        ]
        # TensorFlow's checkpoints hold an object's attributes, and look into no lists of Keras.
        for index, layer in enumerate(self.layers):
            self._track_trackable(layer, f"layer-{index}")
        seeds = tf.train.Checkpoint(state=self.seed_generator.state)
        self._track_trackable(seeds, "seed_generator")

    def build(self, input_shape: Any = None) -> None:
        hidden, embed = self.config.hidden_size, self.config.word_embed_proj_dim
        self.embed_tokens.build()
        self.embed_positions.build()
        if self.project_in is not None and self.project_out is not None:
            self.project_in.build((None, embed))
            self.project_out.build((None, hidden))
        if self.final_layer_norm is not None:
            self.final_layer_norm.build((None, hidden))
        for layer in self.layers:
            layer.build()

    def save_own_variables(self, store: Any) -> None:
        """The state of dropout's seeds, which Keras would not save: training goes on as it would."""
        store["0"] = self.seed_generator.state.numpy()

    def load_own_variables(self, store: Any) -> None:
        if "0" in store:  # files of other origin have none
            self.seed_generator.state.assign(store["0"])

    def call(
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
        training: bool | None = None,
        position_ids: Tensor | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Arguments and result as `TFOPTModel.call`."""
        config = self.config
        past = None if past_key_values is None else KVCache.from_pairs(past_key_values)
        past_length = 0 if past is None else past.used

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # [B, T, E]
            inputs_embeds = existing_rows(inputs_embeds, input_ids, config.vocab_size)
            inputs_embeds = still_pads(inputs_embeds, input_ids, config.pad_token_id)
        inputs_embeds = tf.cast(inputs_embeds, self.compute_dtype)
        length = keras.ops.shape(inputs_embeds)[1]
        if attention_mask is not None:
            attention_mask = self._fit(attention_mask, past, length)
        texts = None
        if position_ids is not None and past is None:
            texts = packed_texts(position_ids)
        if position_ids is None:
            position_ids = self._positions(attention_mask, length, past_length)
        # In a compiled loop the kernel sees all columns, and the bias hides those not in use.
        is_known = isinstance(past_length, int)
        has_room = past is not None and past.length is not None and not is_known
        total = past.capacity if has_room else past_length + length
        plan = plan_call(
            config,
            KERNELS,
            self.attn_implementation,
            Asked(use_cache, output_attentions, output_hidden_states, return_dict),
            Facts(
                length=inputs_embeds.shape[1],
                has_past=not is_known or past_length != 0,
                has_room=has_room,
                hides=attention_mask is not None,
                has_texts=texts is not None,
                masks_heads=head_mask is not None,
                trains=bool(training),
                recomputes=self.gradient_checkpointing and bool(training),
            ),
        )
        tell_once(plan)
        hidden_states = self._embed(inputs_embeds, position_ids)
        bias = self._bias(plan.bias, attention_mask, hidden_states, past_length, total, texts)
        output = self._run_layers(plan, hidden_states, bias, head_mask, past, training)
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
        bias: Bias | None,
        head_mask: Tensor | None,
        past: KVCache | None,
        training: bool | None,
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
            keeps = self._keeps_layer() if training and self.layerdrop else True
            if keeps is False:
                continue
            run = partial(recomputed, layer) if plan.recomputes else layer
            output, weights, cache = run(
                hidden_states,
                kernel=plan.kernel.function,
                bias=bias,
                is_causal=plan.is_causal,
                head_mask=None
                if head_mask is None
                else head_mask[index][:, None, None],  # [N, 1, 1]
                past=None if past is None else past.layers[index],
                past_length=None if past is None or past.length is None else past.used,
                seed=self._next_seed() if training else None,
            )
            hidden_states = output if keeps is True else tf.where(keeps, output, hidden_states)
            if plan.use_cache:
                caches += (cache,)
            if plan.output_attentions and weights is not None:
                all_attentions += (weights,)
        length = keras.ops.shape(hidden_states)[1]
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

    def _next_seed(self) -> Tensor:
        return tf.cast(self.seed_generator.next(), tf.int64)  # [2]

    def _keeps_layer(self) -> bool | Tensor:
        """Whether layerdrop spares a layer; a tensor in a graph, where all layers are computed."""
        keeps = tf.random.stateless_uniform((), self._next_seed()) >= self.layerdrop
        return bool(keeps) if tf.executing_eagerly() else keeps

    def _fit(self, attention_mask: Tensor, past: KVCache | None, length: int | Tensor) -> Tensor:
        """The mask [B, S] over the keys: those in use, or in a compiled loop all columns."""
        if past is None:
            return attention_mask
        if isinstance(past.used, int):
            return attention_mask[:, : past.used + length]  # of a fixed cache: longer
        missing = past.capacity - keras.ops.shape(attention_mask)[1]
        return tf.pad(attention_mask, [[0, 0], [0, missing]])

    def _bias(
        self,
        kind: BiasKind,
        attention_mask: Tensor | None,
        hidden_states: Tensor,
        past_length: int | Tensor,
        total: int | Tensor,
        texts: Tensor | None,
    ) -> Bias | None:
        """What tells the kernel which keys are hidden."""
        length = keras.ops.shape(hidden_states)[1]
        if kind is BiasKind.FULL:
            dtype = hidden_states.dtype
            return attention_bias(attention_mask, length, total, past_length, dtype, texts)
        return None

    def _positions(
        self, attention_mask: Tensor | None, length: int | Tensor, past_length: int | Tensor
    ) -> Tensor:
        """[B or 1, T]. Positions count a row's real tokens, so padding on the left shifts none."""
        if attention_mask is not None:
            return positions_from_mask(attention_mask, past_length, length)
        return past_length + tf.range(length)[None]
