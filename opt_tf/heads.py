# SPDX-License-Identifier: Apache-2.0
"""The model with a language modelling head on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core import GenerationConfig, InputError, OPTConfig, UnsupportedError
from opt_core.generation.transitions import transition_scores
from opt_tf.generation.generate import generate
from opt_tf.losses import causal_lm_loss
from opt_tf.model import TFOPTModel
from opt_tf.outputs import CausalLMOutput, GenerateOutput
from opt_tf.parts import linear
from opt_tf.pretrained import TFOPTPreTrainedModel


@keras.saving.register_keras_serializable("opt_tf")
class TFOPTForCausalLM(TFOPTPreTrainedModel):
    """OPT with a language modelling head, by default tied to the word embeddings."""

    architecture = "OPTForCausalLM"

    def __init__(self, config: OPTConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.model = TFOPTModel(
            config,
            attn_implementation=self.attn_implementation,
            name="model",
            dtype=self.dtype_policy,
        )
        # A tied head is the word embedding again: no parameter of its own.
        self.lm_head: keras.layers.Dense | None = None
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.vocab_size, "lm_head", self.dtype_policy, bias=False)
        self.post_init()

    def build(self, input_shape: Any = None) -> None:
        # The base model has built itself.
        if self.lm_head is not None:
            self.lm_head.build((None, self.config.word_embed_proj_dim))

    def get_output_embeddings(self) -> keras.layers.Layer:
        return self.get_input_embeddings() if self.lm_head is None else self.lm_head

    def set_output_embeddings(self, value: keras.layers.Dense) -> None:
        if self.config.tie_word_embeddings:
            raise InputError(
                "The head is tied to the word embeddings: set config.tie_word_embeddings to False "
                "first, or use set_input_embeddings."
            )
        self._replace(self, "lm_head", value)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[..., E] -> [..., V]"""
        if self.lm_head is not None:
            return self.lm_head(hidden_states)
        # The tied head is the embedding itself.
        embedding = self.get_input_embeddings()
        if embedding.quantization_mode is not None:
            raise UnsupportedError(
                f"The word embeddings are quantized ({embedding.quantization_mode}), and the head "
                "tied to them reads numbers. Use model.quantize, which spares them."
            )
        table = tf.cast(embedding.embeddings, hidden_states.dtype)  # [V, E]
        *leading, embed = keras.ops.shape(hidden_states)
        logits = tf.matmul(tf.reshape(hidden_states, (-1, embed)), table, transpose_b=True)
        return tf.reshape(logits, (*leading, self.config.vocab_size))

    def call(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool | None = None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Runs the model; arguments as `TFOPTModel.call`, and

        Args:
            labels: [B, T] token ids, -100 where none counts; shifted here, not by the caller.

        Returns:
            `loss` (with labels), `logits` [B, T, V], and the optional fields of `TFOPTModel`.

        Raises:
            InputError: arguments that do not fit each other or the model.
        """
        outputs = self.model.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            head_mask=head_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            training=training,
            position_ids=position_ids,
        )
        logits = self.compute_logits(outputs.last_hidden_state)  # [B, T, V]
        output = CausalLMOutput(
            loss=None if labels is None else causal_lm_loss(logits, labels),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def generate(
        self,
        input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Continues the prompts; see `opt_tf.generation.generate.generate`."""
        return generate(self, input_ids, generation_config, **options)

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The score of each new token; see `opt_core.generation.transitions.transition_scores`."""
        arrays = [np.asarray(x) for x in scores]
        rows = None if beam_indices is None else np.asarray(beam_indices)
        found = transition_scores(np.asarray(sequences), arrays, rows, normalize_logits)
        return tf.constant(found)

    def loss_of(
        self, output: CausalLMOutput, target: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        return causal_lm_loss(output.logits, target, sample_weight)
