# SPDX-License-Identifier: Apache-2.0
"""The two phases of decoding, and the loop over the second.

The loop receives `step(token, cache) -> (logits, cache)`, so it can be run without a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opt_core.generation.plan import DecodePlan
from opt_torch.cache import KVCache
from opt_torch.generation.processors import process
from opt_torch.generation.state import DecodeState

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
Noise = Callable[[int], Tensor]


def prefill(
    model: Any, tokens: Tensor, mask: Tensor | None, plan: DecodePlan
) -> tuple[Tensor, KVCache]:
    """Runs the prompts [B, T] into a fresh cache; returns the last logits [B, V] and the cache."""
    cache = model.init_cache(tokens.shape[0], plan.capacity)
    hidden_states, cache = model.model(
        tokens, attention_mask=mask, past_key_values=cache, use_cache=True, return_dict=False
    )[:2]
    return model.lm_head(hidden_states[:, -1]), cache


def decode_step(model: Any, mask: Tensor | None, counts: Tensor, prompt_length: int) -> Step:
    """The step of the loop: one token [B, 1] through the model.

    Args:
        mask: [B, S] for all columns of the cache, or None where no row is padded.
        counts: [B] real tokens in each prompt.
    """

    def step(token: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        positions = (counts + cache.used - prompt_length)[:, None]  # [B, 1]
        hidden_states, cache = model.model(
            token,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=False,
        )[:2]
        return model.lm_head(hidden_states[:, -1]), cache

    return step


def decode(plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None) -> Tensor:
    """Decodes greedily, or samples where there is noise; returns the new tokens [B, at most new].

    Sampling is argmax(scores + noise) with Gumbel noise. A row that has ended continues with pads;
    the loop ends with the last row.
    """
    eos = torch.tensor(plan.eos_token_ids, dtype=torch.long, device=state.tokens.device)
    for index in range(plan.max_new_tokens):
        scores = process(plan.processors, state.logits, state)
        if noise is not None:
            scores = scores + noise(index)
        token = torch.where(state.finished, plan.pad_token_id, scores.argmax(-1))  # [B]
        state.tokens[:, state.length] = token
        finished = state.finished | torch.isin(token, eos)
        state = replace(state, length=state.length + 1, finished=finished)
        if index + 1 == plan.max_new_tokens or bool(finished.all()):
            break
        logits, cache = step(token[:, None], state.cache)
        state = replace(state, logits=logits, cache=cache)
    return state.tokens[:, state.prompt_length : state.length]
