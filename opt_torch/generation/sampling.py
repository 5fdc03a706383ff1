# SPDX-License-Identifier: Apache-2.0
"""The processors that say which tokens are drawn from, and how likely each is: scores [B, V] alone."""

from __future__ import annotations

import torch
from torch import Tensor

from opt_core.generation import processors as p
from opt_torch.generation.state import AT_HAND, DecodeState

#: So many of the likeliest tokens are looked at first: sorting all of them takes ten times as long.
_LIKELIEST = 1024


def temperature(processor: p.Temperature, scores: Tensor, state: DecodeState) -> Tensor:
    return scores / processor.temperature


def top_k(processor: p.TopK, scores: Tensor, state: DecodeState) -> Tensor:
    return torch.where(scores < _lowest_of(scores, processor.k), -torch.inf, scores)


def top_p(processor: p.TopP, scores: Tensor, state: DecodeState) -> Tensor:
    lowest = _lowest_of_mass(scores, scores, processor.p, processor.keep)
    return torch.where(scores < lowest, -torch.inf, scores)


def min_p(processor: p.MinP, scores: Tensor, state: DecodeState) -> Tensor:
    probabilities = torch.softmax(scores, dim=-1)
    likeliest = torch.amax(probabilities, dim=-1, keepdim=True)  # [B, 1]
    return _without(probabilities < processor.p * likeliest, scores, processor.keep)


def typical(processor: p.Typical, scores: Tensor, state: DecodeState) -> Tensor:
    log_probs = torch.log_softmax(scores, dim=-1)
    ranks = -torch.abs(-log_probs - _entropy(log_probs))
    lowest = _lowest_of_mass(ranks, scores, processor.mass, processor.keep)
    return torch.where(ranks < lowest, -torch.inf, scores)


def epsilon(processor: p.Epsilon, scores: Tensor, state: DecodeState) -> Tensor:
    probabilities = torch.softmax(scores, dim=-1)
    return _without(probabilities < processor.cutoff, scores, processor.keep)


def eta(processor: p.Eta, scores: Tensor, state: DecodeState) -> Tensor:
    log_probs = torch.log_softmax(scores, dim=-1)
    adapted = processor.cutoff**0.5 * torch.exp(-_entropy(log_probs))  # [B, 1]
    cutoff = torch.clamp(adapted, max=processor.cutoff)
    return _without(torch.exp(log_probs) < cutoff, scores, processor.keep)


def renormalize(processor: p.Renormalize, scores: Tensor, state: DecodeState) -> Tensor:
    return torch.log_softmax(scores, dim=-1)


def _lowest_of(scores: Tensor, count: int) -> Tensor:
    """The lowest [B, 1] of the highest scores."""
    highest = torch.topk(scores, min(count, scores.shape[-1])).values
    return torch.amin(highest, dim=-1, keepdim=True)


def _lowest_of_mass(ranks: Tensor, scores: Tensor, mass: float, keep: int) -> Tensor:
    """The lowest [B, 1] of the highest ranks [B, V] whose tokens have this probability together."""
    probabilities = torch.softmax(scores, dim=-1)

    def lowest_among(count: int) -> tuple[Tensor, Tensor]:
        """The lowest rank [B, 1] if `count` tokens suffice, and whether they do."""
        highest, tokens = torch.topk(ranks, count)  # [B, count]
        found = torch.gather(probabilities, 1, tokens)
        before = torch.cumsum(found, dim=-1) - found
        kept = torch.sum(before < mass, dim=-1, keepdim=True)  # [B, 1]
        kept = torch.clamp(kept, min=keep, max=count)
        lowest = torch.gather(highest, 1, kept - 1)
        return lowest, torch.all(kept < count)

    vocab_size = scores.shape[-1]
    count = min(max(_LIKELIEST, keep), vocab_size)
    if ranks.device.type not in AT_HAND:  # whether fewer suffice would have to be waited for
        count = vocab_size
    lowest, suffices = lowest_among(count)
    if count == vocab_size:
        return lowest
    return lowest if suffices else lowest_among(vocab_size)[0]


def _without(removed: Tensor, scores: Tensor, keep: int) -> Tensor:
    """Scores without some tokens [B, V], but with the `keep` likeliest."""
    return torch.where(removed & (scores < _lowest_of(scores, keep)), -torch.inf, scores)


def _entropy(log_probs: Tensor) -> Tensor:
    """Of each row, [B, 1]."""
    probabilities = torch.exp(log_probs)
    terms = torch.where(probabilities > 0, probabilities * log_probs, 0.0)
    return -torch.sum(terms, dim=-1, keepdim=True)
