# SPDX-License-Identifier: Apache-2.0
"""The models with a head for a task: classification of texts, and answers found in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from opt_core import OPTConfig
from opt_core.tasks import check_poolable, check_span, problem_type
from opt_flax.attention import DEFAULT_KERNEL
from opt_flax.losses import classification_loss, span_loss
from opt_flax.model import OPTModule
from opt_flax.outputs import QuestionAnsweringOutput, SequenceClassifierOutput
from opt_flax.parts import linear
from opt_flax.pretrained import FlaxOPTPreTrainedModel


class OPTForSequenceClassificationModule(nn.Module):
    """The Linen module of `FlaxOPTForSequenceClassification`."""

    config: OPTConfig
    attn_implementation: str = DEFAULT_KERNEL
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self) -> None:
        config = self.config
        numbers = (config.init_std, self.dtype, self.param_dtype)
        self.model = OPTModule(
            config,
            self.attn_implementation,
            self.dtype,
            self.param_dtype,
            self.gradient_checkpointing,
        )
        self.score = linear(config.num_labels, *numbers, bias=False)

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
        legacy_pooling: bool = False,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
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
        hidden_states = outputs.last_hidden_state  # [B, T, E]
        batch, from_ids = len(hidden_states), input_ids is not None
        check_poolable(self.config, batch, from_ids=from_ids, legacy=legacy_pooling)
        mask = None if legacy_pooling else attention_mask
        is_real = real_tokens(hidden_states, input_ids, mask, self.config.pad_token_id)
        columns = last_columns(is_real, legacy_pooling)  # [B]
        rows = jnp.arange(batch)
        logits = self.score(hidden_states[rows, columns])  # [B, num_labels]
        loss = None
        if labels is not None:
            problem = problem_type(self.config, str(labels.dtype))
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


class FlaxOPTForSequenceClassification(FlaxOPTPreTrainedModel):
    """OPT with a classification head, which reads the last real token of each row."""

    architecture = "OPTForSequenceClassification"
    module_class = OPTForSequenceClassificationModule

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
        legacy_pooling: bool = False,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Runs the model; arguments as `FlaxOPTModel.__call__`, and

        Args:
            labels: [B] classes, or [B, num_labels] numbers; `config.problem_type` says which, or is
                told by the labels' dtype.
            legacy_pooling: reads the token before the first pad, as the reference up to 4.48 did,
                instead of the last one that is no pad.

        Returns:
            `loss` (with labels), `logits` [B, num_labels], and the optional fields of
            `FlaxOPTModel`.

        Raises:
            InputError: arguments that do not fit each other or the model; several rows, and no
                `config.pad_token_id` to tell their ends by.
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
            legacy_pooling=legacy_pooling,
        )


class OPTForQuestionAnsweringModule(nn.Module):
    """The Linen module of `FlaxOPTForQuestionAnswering`."""

    config: OPTConfig
    attn_implementation: str = DEFAULT_KERNEL
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self) -> None:
        config = self.config
        numbers = (config.init_std, self.dtype, self.param_dtype)
        self.model = OPTModule(
            config,
            self.attn_implementation,
            self.dtype,
            self.param_dtype,
            self.gradient_checkpointing,
        )
        self.qa_outputs = linear(2, *numbers, bias=True)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        head_mask: Array | None = None,
        past_key_values: Any = None,
        inputs_embeds: Array | None = None,
        start_positions: Array | None = None,
        end_positions: Array | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Array | None = None,
        deterministic: bool = True,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
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
        hidden_states = outputs.last_hidden_state  # [B, T, E]
        start, end = start_positions, end_positions
        shapes = [None if x is None else x.shape for x in (start, end)]
        check_span(shapes[0], shapes[1], len(hidden_states))
        scores = self.qa_outputs(hidden_states)  # [B, T, 2]
        start_logits, end_logits = scores[..., 0], scores[..., 1]
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


class FlaxOPTForQuestionAnswering(FlaxOPTPreTrainedModel):
    """OPT with a head that scores each token as the start and as the end of the answer."""

    architecture = "OPTForQuestionAnswering"
    module_class = OPTForQuestionAnsweringModule

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
        start_positions: Any = None,
        end_positions: Any = None,
        use_cache: bool | None = None,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """Runs the model; arguments as `FlaxOPTModel.__call__`, and

        Args:
            start_positions, end_positions: [B], the columns of the answer's first and last token;
                those beyond the text do not count.

        Returns:
            `loss` (with positions), `start_logits` and `end_logits` [B, T], `hidden_states`,
            `attentions`.

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
                "start_positions": start_positions,
                "end_positions": end_positions,
            },
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


def real_tokens(
    hidden_states: Array,
    input_ids: Array | None,
    attention_mask: Array | None,
    pad_token_id: int | None,
) -> Array:
    """Which tokens [B, T] a text can end with: those that are no pads, by the ids where there are any."""
    if input_ids is not None and pad_token_id is not None:
        return input_ids != pad_token_id
    if input_ids is None and attention_mask is not None:
        return attention_mask[:, -hidden_states.shape[1] :] != 0
    return jnp.ones(hidden_states.shape[:2], bool)


def last_columns(is_real: Array, legacy_pooling: bool) -> Array:
    """The column [B] of each row's last real token, or that before its first pad.

    `modeling_opt.py:1290-1310` of the reference, and its successor in 4.49.

    Args:
        is_real: [B, T]
    """
    length = is_real.shape[1]
    if legacy_pooling:
        return ((~is_real).argmax(-1) - 1) % length
    return (jnp.arange(length) * is_real).argmax(-1)
