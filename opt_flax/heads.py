# SPDX-License-Identifier: Apache-2.0
"""The model with a language modelling head on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from opt_core import GenerationConfig, InputError, OPTConfig
from opt_core.generation.transitions import transition_scores
from opt_core.params import EMBEDDING_NAME, TIED_HEAD_NAME, has_untied_head
from opt_flax.attention import DEFAULT_KERNEL
from opt_flax.generation.generate import generate
from opt_flax.losses import causal_lm_loss
from opt_flax.model import OPTModule
from opt_flax.outputs import CausalLMOutput, GenerateOutput
from opt_flax.parts import linear
from opt_flax.pretrained import FlaxOPTPreTrainedModel
from opt_flax.weights import find_rows


class OPTForCausalLMModule(nn.Module):
    """The Linen module of `FlaxOPTForCausalLM`: arguments as there, then `deterministic` and `last`."""

    config: OPTConfig
    attn_implementation: str = DEFAULT_KERNEL
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self) -> None:
        config = self.config
        self.model = OPTModule(
            config,
            self.attn_implementation,
            self.dtype,
            self.param_dtype,
            self.gradient_checkpointing,
        )
        # A tied head is the word embedding again: no parameter of its own.
        if has_untied_head(config):
            numbers = (config.init_std, self.dtype, self.param_dtype)
            self.lm_head = linear(config.vocab_size, *numbers, bias=False)

    def logits(self, hidden_states: Array) -> Array:
        """[..., E] -> [..., V], by the word embeddings where the configuration ties the head."""
        if has_untied_head(self.config):
            return self.lm_head(hidden_states)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.model.decoder.embed_tokens.attend(flat)
        return logits.reshape(*hidden_states.shape[:-1], self.config.vocab_size)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        head_mask: Array | None = None,
        past_key_values: Any = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Array | None = None,
        deterministic: bool = True,
        last: bool = False,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """With `last`, the logits [B, 1, V] are those of the last column alone."""
        outputs: Any = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            head_mask=head_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            position_ids=position_ids,
            deterministic=deterministic,
        )
        columns = slice(-1, None) if last else slice(None)
        logits = self.logits(outputs.last_hidden_state[:, columns])  # [B, T, V]
        output = CausalLMOutput(
            loss=None if labels is None else causal_lm_loss(logits, labels),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class FlaxOPTForCausalLM(FlaxOPTPreTrainedModel):
    """OPT with a language modelling head, by default tied to the word embeddings."""

    architecture = "OPTForCausalLM"
    module_class = OPTForCausalLMModule

    def get_output_embeddings(self) -> Array:
        """[V, E] of `params`: the word embeddings again, where they are tied."""
        name = TIED_HEAD_NAME if has_untied_head(self.config) else EMBEDDING_NAME
        return find_rows(self.params, self.config, self.architecture, name)

    def set_output_embeddings(self, value: Any) -> None:
        if self.config.tie_word_embeddings:
            raise InputError(
                "The head is tied to the word embeddings: set config.tie_word_embeddings to False "
                "first, or use set_input_embeddings."
            )
        self._set_rows(TIED_HEAD_NAME, value)

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
        labels: Any = None,
        use_cache: bool | None = None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Runs the model; arguments as `FlaxOPTModel.__call__`, and

        Args:
            labels: [B, T] token ids, -100 where none counts; shifted here, not by the caller.

        Returns:
            `loss` (with labels), `logits` [B, T, V], and the optional fields of `FlaxOPTModel`.

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
                "labels": labels,
            },
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )

    def generate(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> GenerateOutput:
        """Continues the prompts; see `opt_flax.generation.generate.generate`."""
        return generate(self, input_ids, generation_config, **options)

    def compute_transition_scores(
        self,
        sequences: Array,
        scores: Sequence[Array],
        beam_indices: Array | None = None,
        normalize_logits: bool = False,
    ) -> Array:
        """The score of each new token; see `opt_core.generation.transitions.transition_scores`."""
        arrays = [np.asarray(x) for x in scores]
        rows = None if beam_indices is None else np.asarray(beam_indices)
        found = transition_scores(np.asarray(sequences), arrays, rows, normalize_logits)
        return jnp.asarray(found)
