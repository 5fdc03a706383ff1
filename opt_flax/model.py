# SPDX-License-Identifier: Apache-2.0
"""The bare model: a decoder, and no head on top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from opt_core import OPTConfig
from opt_flax.attention import DEFAULT_KERNEL
from opt_flax.decoder import OPTDecoder
from opt_flax.outputs import BaseModelOutput
from opt_flax.pretrained import FlaxOPTPreTrainedModel


class OPTModule(nn.Module):
    """The Linen module of `FlaxOPTModel`: arguments as there, and `deterministic` last."""

    config: OPTConfig
    attn_implementation: str = DEFAULT_KERNEL
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self) -> None:
        self.decoder = OPTDecoder(
            self.config,
            self.attn_implementation,
            self.dtype,
            self.param_dtype,
            self.gradient_checkpointing,
        )

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
        return self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            head_mask=head_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            position_ids=position_ids,
            deterministic=deterministic,
        )


class FlaxOPTModel(FlaxOPTPreTrainedModel):
    """The bare OPT model: hidden states, no head on top."""

    architecture = "OPTModel"
    module_class = OPTModule

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        params: Mapping[str, Any] | None = None,
        past_key_values: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        dropout_rng: Array | None = None,
        deterministic: bool = True,
        *,
        train: bool | None = None,
        head_mask: Any = None,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Runs the decoder; a pure function of its arguments, under `jax.jit`, `grad` and `vmap` too.

        Args:
            input_ids: [B, T] token ids; either these or `inputs_embeds`.
            attention_mask: [B, S], 1 at real tokens, 0 at pads; S counts past tokens too, and may
                be the capacity of a fixed cache.
            position_ids: [B, T]; by default counted from the attention mask. Without a cache, each
                0 in the midst of a row begins another text, which sees itself alone.
            params: the parameters to use instead of `self.params`.
            past_key_values: a `KVCache`, or per layer a pair of [B, N, S, H].
            output_attentions: whether to return weights, per layer [B, N, T, S].
            output_hidden_states: whether to return each layer's input and the last output.
            return_dict: False for a tuple of the computed fields.
            dropout_rng: a key, needed for training with dropout.
            deterministic: False to train, with dropout.
            train: the same the other way round; beats `deterministic`.
            head_mask: [L, N] factors of the attention weights.
            inputs_embeds: [B, T, E], in the space of the word embeddings.
            use_cache: whether to return `past_key_values`; by default where they were given.

        Returns:
            `last_hidden_state` [B, T, E], `past_key_values`, `hidden_states`, `attentions`.

        Raises:
            InputError: arguments that do not fit each other or the model.
        """
        return self._call(
            params,
            dropout_rng,
            deterministic if train is None else not train,
            arrays={
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "head_mask": head_mask,
                "inputs_embeds": inputs_embeds,
                "position_ids": position_ids,
            },
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
