# SPDX-License-Identifier: Apache-2.0
"""The models with a head for a task: classification of texts, and answers found in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opt_core import OPTConfig
from opt_core.tasks import check_poolable, check_span, problem_type
from opt_torch.losses import classification_loss, span_loss
from opt_torch.model import OPTModel
from opt_torch.outputs import QuestionAnsweringOutput, SequenceClassifierOutput
from opt_torch.parts import Linear, own_layers
from opt_torch.pretrained import OPTPreTrainedModel


class OPTForSequenceClassification(OPTPreTrainedModel):
    """OPT with a classification head, which reads the last real token of each row."""

    architecture = "OPTForSequenceClassification"

    def __init__(self, config: OPTConfig, *, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        self.model = OPTModel(config, attn_implementation=self.attn_implementation)
        with own_layers():
            self.score = Linear(config.word_embed_proj_dim, config.num_labels, bias=False)
        self.post_init()

    def forward(
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
        position_ids: Tensor | None = None,
        legacy_pooling: bool = False,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Runs the model; arguments as `OPTModel.forward`, and

        Args:
            labels: [B] classes, or [B, num_labels] numbers; `config.problem_type` says which, or is
                told by the labels' dtype.
            legacy_pooling: reads the token before the first pad, as the reference up to 4.48 did,
                instead of the last one that is no pad.

        Returns:
            `loss` (with labels), `logits` [B, num_labels], and the optional fields of `OPTModel`.

        Raises:
            InputError: arguments that do not fit each other or the model; several rows, and no
                `config.pad_token_id` to tell their ends by.
        """
        outputs = self.model(
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
        )
        hidden_states = outputs.last_hidden_state  # [B, T, E]
        batch, from_ids = len(hidden_states), input_ids is not None
        check_poolable(self.config, batch, from_ids=from_ids, legacy=legacy_pooling)
        mask = None if legacy_pooling else attention_mask
        is_real = real_tokens(hidden_states, input_ids, mask, self.config.pad_token_id)
        columns = last_columns(is_real, legacy_pooling)  # [B]
        rows = torch.arange(batch, device=hidden_states.device)
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


class OPTForQuestionAnswering(OPTPreTrainedModel):
    """OPT with a head that scores each token as the start and as the end of the answer."""

    architecture = "OPTForQuestionAnswering"

    def __init__(self, config: OPTConfig, *, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        self.model = OPTModel(config, attn_implementation=self.attn_implementation)
        with own_layers():
            self.qa_outputs = Linear(config.word_embed_proj_dim, 2)
        self.post_init()

    def forward(
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
        position_ids: Tensor | None = None,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """Runs the model; arguments as `OPTModel.forward`, and

        Args:
            start_positions, end_positions: [B], the columns of the answer's first and last token;
                those beyond the text do not count.

        Returns:
            `loss` (with positions), `start_logits` and `end_logits` [B, T], `hidden_states`,
            `attentions`.

        Raises:
            InputError: arguments that do not fit each other or the model.
        """
        outputs = self.model(
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
        )
        hidden_states = outputs.last_hidden_state  # [B, T, E]
        start, end = start_positions, end_positions
        shapes = [None if x is None else x.shape for x in (start, end)]
        check_span(shapes[0], shapes[1], len(hidden_states))
        start_logits, end_logits = self.qa_outputs(hidden_states).unbind(-1)  # [B, T] each
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
        return attention_mask[:, -hidden_states.shape[1] :] != 0
    return torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)


def last_columns(is_real: Tensor, legacy_pooling: bool) -> Tensor:
    """The column [B] of each row's last real token, or that before its first pad.

    `modeling_opt.py:1290-1310` of the reference, and its successor in 4.49.

    Args:
        is_real: [B, T]
    """
    length = is_real.shape[1]
    if legacy_pooling:
        return ((~is_real).int().argmax(-1) - 1) % length
    return (torch.arange(length, device=is_real.device) * is_real).argmax(-1)
