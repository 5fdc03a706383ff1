# SPDX-License-Identifier: Apache-2.0
"""The bare model: a decoder, and no head on top."""

from __future__ import annotations

from typing import Any

import keras
from tensorflow import Tensor

from opt_core import OPTConfig
from opt_tf.decoder import OPTDecoder
from opt_tf.outputs import BaseModelOutput
from opt_tf.pretrained import TFOPTPreTrainedModel


@keras.saving.register_keras_serializable("opt_tf")
class TFOPTModel(TFOPTPreTrainedModel):
    """The bare OPT model: hidden states, no head on top."""

    architecture = "OPTModel"

    def __init__(self, config: OPTConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.decoder = OPTDecoder(
            config, self.attn_implementation, name="decoder", dtype=self.dtype_policy
        )
        self.post_init()

    def build(self, input_shape: Any = None) -> None:
        self.decoder.build()

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
        """Runs the decoder.

        Args:
            input_ids: [B, T] token ids; either these or `inputs_embeds`. Or all inputs at once: a
                dict, or a list that begins [input_ids, attention_mask].
            attention_mask: [B, S], 1 at real tokens, 0 at pads; S counts past tokens too.
            head_mask: [L, N] factors of the attention weights.
            past_key_values: a `KVCache`, or per layer a pair of [B, N, S, H].
            inputs_embeds: [B, T, E], in the space of the word embeddings.
            use_cache: whether to return `past_key_values`.
            output_attentions: whether to return weights, per layer [B, N, T, S].
            output_hidden_states: whether to return each layer's input and the last output.
            return_dict: False for a tuple of the computed fields.
            training: whether dropout and layerdrop are on.
            position_ids: [B, T]; by default counted from the attention mask. Without a cache, each
                0 in the midst of a row begins another text, which sees itself alone.

        Returns:
            `last_hidden_state` [B, T, E], `past_key_values`, `hidden_states`, `attentions`.

        Raises:
            InputError: arguments that do not fit each other or the model.
        """
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
            training=training,
            position_ids=position_ids,
        )

    def predictions_of(self, output: BaseModelOutput) -> Tensor:
        return output.last_hidden_state
