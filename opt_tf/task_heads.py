# SPDX-License-Identifier: Apache-2.0
"""The models with a head for a task: classification of texts, and answers found in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core import InputError, OPTConfig
from opt_core.tasks import check_poolable, check_span, problem_type
from opt_tf.losses import classification_loss, span_loss
from opt_tf.model import TFOPTModel
from opt_tf.outputs import QuestionAnsweringOutput, SequenceClassifierOutput
from opt_tf.parts import linear
from opt_tf.pretrained import TFOPTPreTrainedModel


@keras.saving.register_keras_serializable("opt_tf")
class TFOPTForSequenceClassification(TFOPTPreTrainedModel):
    """OPT with a classification head, which reads the last real token of each row."""

    architecture = "OPTForSequenceClassification"

    def __init__(self, config: OPTConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.model = TFOPTModel(
            config,
            attn_implementation=self.attn_implementation,
            name="model",
            dtype=self.dtype_policy,
        )
        self.score = linear(config.num_labels, "score", self.dtype_policy, bias=False)
        self.post_init()

    def build(self, input_shape: Any = None) -> None:
        self.score.build((None, self.config.word_embed_proj_dim))

    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool | None = None,
        position_ids: Tensor | None = None,
        legacy_pooling: bool = False,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Runs the model; arguments as `TFOPTModel.call`, and

        Args:
            labels: [B] classes, or [B, num_labels] numbers; `config.problem_type` says which, or is
                told by the labels' dtype.
            legacy_pooling: reads the token before the first pad, as the reference up to 4.48 did,
                instead of the last one that is no pad.

        Returns:
            `loss` (with labels), `logits` [B, num_labels], and the optional fields of `TFOPTModel`.

        Raises:
            InputError: arguments that do not fit each other or the model; several rows, and no
                `config.pad_token_id` to tell their ends by.
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
        hidden_states = outputs.last_hidden_state  # [B, T, E]
        batch, from_ids = hidden_states.shape[0], input_ids is not None
        check_poolable(self.config, batch, from_ids=from_ids, legacy=legacy_pooling)
        mask = None if legacy_pooling else attention_mask
        is_real = real_tokens(hidden_states, input_ids, mask, self.config.pad_token_id)
        columns = last_columns(is_real, legacy_pooling)  # [B]
        logits = self.score(tf.gather(hidden_states, columns, batch_dims=1))  # [B, num_labels]
        loss = None
        if labels is not None:
            problem = problem_type(self.config, keras.backend.standardize_dtype(labels.dtype))
            loss = classification_loss(logits, labels, problem)
        output = SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def loss_of(
        self, output: SequenceClassifierOutput, target: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        problem = problem_type(self.config, keras.backend.standardize_dtype(target.dtype))
        return classification_loss(output.logits, target, problem, sample_weight)


@keras.saving.register_keras_serializable("opt_tf")
class TFOPTForQuestionAnswering(TFOPTPreTrainedModel):
    """OPT with a head that scores each token as the start and as the end of the answer."""

    architecture = "OPTForQuestionAnswering"

    def __init__(self, config: OPTConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.model = TFOPTModel(
            config,
            attn_implementation=self.attn_implementation,
            name="model",
            dtype=self.dtype_policy,
        )
        self.qa_outputs = linear(2, "qa_outputs", self.dtype_policy, bias=True)
        self.post_init()

    def build(self, input_shape: Any = None) -> None:
        self.qa_outputs.build((None, self.config.word_embed_proj_dim))

    def call(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool | None = None,
        position_ids: Tensor | None = None,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """Runs the model; arguments as `TFOPTModel.call`, and

        Args:
            start_positions, end_positions: [B], the columns of the answer's first and last token;
                those beyond the text do not count.

        Returns:
            `loss` (with positions), `start_logits` and `end_logits` [B, T], `hidden_states`,
            `attentions`.

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
        hidden_states = outputs.last_hidden_state  # [B, T, E]
        start, end = start_positions, end_positions
        shapes = [None if x is None else tuple(x.shape) for x in (start, end)]
        check_span(shapes[0], shapes[1], hidden_states.shape[0])
        start_logits, end_logits = tf.unstack(self.qa_outputs(hidden_states), axis=-1)  # [B, T]
        loss = None
        if start is not None and end is not None:
            loss = span_loss(start_logits, end_logits, start, end)
        output = QuestionAnsweringOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def predictions_of(self, output: QuestionAnsweringOutput) -> tuple[Tensor, Tensor]:
        return output.start_logits, output.end_logits

    def labels_in(self, inputs: Any) -> tuple[Any, ...] | None:
        """The pair (start, end), by the names of the two inputs."""
        names = ("start_positions", "end_positions")
        if not isinstance(inputs, Mapping) or any(inputs.get(name) is None for name in names):
            return None
        return tuple(inputs[name] for name in names)

    def loss_of(
        self, output: QuestionAnsweringOutput, target: Any, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Of a target that is a pair (start, end), or a dict of the two by the inputs' names."""
        if isinstance(target, Mapping):
            target = self.labels_in(target)
        if not isinstance(target, list | tuple) or len(target) != 2:
            raise InputError(
                "The target of a question is a pair (start_positions, end_positions) or a dict of "
                f"the two; found {type(target).__name__}."
            )
        start, end = target
        check_span(tuple(start.shape), tuple(end.shape), output.start_logits.shape[0])
        return span_loss(output.start_logits, output.end_logits, start, end, sample_weight)


def real_tokens(
    hidden_states: Tensor,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    pad_token_id: int | None,
) -> Tensor:
    """Which tokens [B, T] a text can end with: those that are no pads, by the ids where there are any."""
    if input_ids is not None and pad_token_id is not None:
        return input_ids != pad_token_id
    if input_ids is None and attention_mask is not None:
        return attention_mask[:, -keras.ops.shape(hidden_states)[1] :] != 0
    return tf.ones(tf.shape(hidden_states)[:2], tf.bool)


def last_columns(is_real: Tensor, legacy_pooling: bool) -> Tensor:
    """The column [B] of each row's last real token, or that before its first pad.

    `modeling_opt.py:1290-1310` of the reference, and its successor in 4.49.

    Args:
        is_real: [B, T]
    """
    length = tf.shape(is_real)[1]
    if legacy_pooling:
        return (tf.argmax(tf.cast(~is_real, tf.int32), -1, tf.int32) - 1) % length
    return tf.argmax(tf.range(length) * tf.cast(is_real, tf.int32), -1, tf.int32)
