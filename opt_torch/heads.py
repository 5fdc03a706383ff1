# SPDX-License-Identifier: Apache-2.0
"""The model with a language modelling head on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opt_core import GenerationConfig, InputError, OPTConfig, UnsupportedError
from opt_core.generation.transitions import transition_scores
from opt_core.params import EMBEDDING_NAME, TIED_HEAD_NAME
from opt_torch.generation.generate import generate
from opt_torch.losses import causal_lm_loss
from opt_torch.model import OPTModel
from opt_torch.outputs import CausalLMOutput, GenerateOutput
from opt_torch.parts import Linear, own_layers
from opt_torch.pretrained import OPTPreTrainedModel


class OPTForCausalLM(OPTPreTrainedModel):
    """OPT with a language modelling head, by default tied to the word embeddings."""

    architecture = "OPTForCausalLM"
    _tied_weights_keys: ClassVar = {TIED_HEAD_NAME: EMBEDDING_NAME}  # PEFT warns of them

    def __init__(self, config: OPTConfig, *, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        self.model = OPTModel(config, attn_implementation=self.attn_implementation)
        # A tied head is the word embedding again: no parameter of its own.
        with own_layers():
            self.lm_head: nn.Linear = Linear(
                config.word_embed_proj_dim, config.vocab_size, bias=False
            )
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        if self.config.tie_word_embeddings:
            raise InputError(
                "The head is tied to the word embeddings: set config.tie_word_embeddings to False "
                "first, or use set_input_embeddings."
            )
        self.lm_head = value

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
    ) -> CausalLMOutput | tuple[Any, ...]:
        """Runs the model; arguments as `OPTModel.forward`, and

        Args:
            labels: [B, T] token ids, -100 where none counts; shifted here, not by the caller.

        Returns:
            `loss` (with labels), `logits` [B, T, V], and the optional fields of `OPTModel`.

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
        logits = self.lm_head(outputs.last_hidden_state)  # [B, T, V]
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
        input_ids: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Continues the prompts; see `opt_torch.generation.generate.generate`."""
        with self._files.checked(self):
            return generate(self, input_ids, generation_config, **options)

    @property
    def prepare_inputs_for_generation(self) -> Callable[..., dict[str, Any]]:
        """What adapter libraries ask a language model for; `generate` has no need of it.

        Setting it raises UnsupportedError: that is how prompts that were learnt would be put in.
        """
        return lambda input_ids, **inputs: {"input_ids": input_ids, **inputs}

    @prepare_inputs_for_generation.setter
    def prepare_inputs_for_generation(self, value: object) -> None:
        raise UnsupportedError(
            "generate() cannot put learnt prompts before its own (prompt tuning and the like). Give "
            "them as inputs_embeds, or use an adapter that changes layers, such as LoRA."
        )

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The score of each new token; see `opt_core.generation.transitions.transition_scores`."""
        arrays = [x.cpu().numpy() for x in scores]
        rows = None if beam_indices is None else beam_indices.cpu().numpy()
        found = transition_scores(sequences.cpu().numpy(), arrays, rows, normalize_logits)
        return torch.from_numpy(found)
