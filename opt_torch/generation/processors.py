# SPDX-License-Identifier: Apache-2.0
"""How each processor of `opt_core.generation.processors` changes the scores [B, V]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from opt_core.generation import processors as p
from opt_torch.generation.state import DecodeState


def repetition_penalty(
    processor: p.RepetitionPenalty, scores: Tensor, state: DecodeState
) -> Tensor:
    tokens, mask = state.tokens[:, : state.length], state.mask[:, : state.length]
    counts = torch.zeros(scores.shape, dtype=mask.dtype, device=scores.device)
    seen = counts.scatter_add(1, tokens, mask) > 0  # [B, V]
    penalty = processor.penalty
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def min_length(processor: p.MinLength, scores: Tensor, state: DecodeState) -> Tensor:
    return _forbid(scores, processor.eos_token_ids, state.length < processor.length)


def min_new_tokens(processor: p.MinNewTokens, scores: Tensor, state: DecodeState) -> Tensor:
    new_tokens = state.length - state.prompt_length
    return _forbid(scores, processor.eos_token_ids, new_tokens < processor.count)


def temperature(processor: p.Temperature, scores: Tensor, state: DecodeState) -> Tensor:
    return scores / processor.temperature


def top_k(processor: p.TopK, scores: Tensor, state: DecodeState) -> Tensor:
    lowest = torch.topk(scores, processor.k).values[:, -1:]  # [B, 1]
    return torch.where(scores < lowest, -torch.inf, scores)


def top_p(processor: p.TopP, scores: Tensor, state: DecodeState) -> Tensor:
    ascending, order = torch.sort(scores, dim=-1, stable=True)
    total = torch.cumsum(torch.softmax(ascending, dim=-1), dim=-1)
    drop = total <= 1 - processor.p
    drop[:, -1] = False  # the most likely token always stays
    return torch.where(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf, scores)


def _forbid(scores: Tensor, token_ids: tuple[int, ...], condition: bool) -> Tensor:
    forbidden = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
    forbidden[list(token_ids)] = condition
    return torch.where(forbidden, -torch.inf, scores)


APPLY: Mapping[type[p.LogitsProcessor], Callable[..., Tensor]] = {
    p.RepetitionPenalty: repetition_penalty,
    p.MinLength: min_length,
    p.MinNewTokens: min_new_tokens,
    p.Temperature: temperature,
    p.TopK: top_k,
    p.TopP: top_p,
}


def process(
    processors: tuple[p.LogitsProcessor, ...], scores: Tensor, state: DecodeState
) -> Tensor:
    """Applies the processors in order to scores [B, V], in float32."""
    scores = scores.float()
    for processor in processors:
        scores = APPLY[type(processor)](processor, scores, state)
    return scores
