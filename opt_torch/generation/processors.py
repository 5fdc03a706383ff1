# SPDX-License-Identifier: Apache-2.0
"""How each processor of `opt_core.generation.processors` changes the scores [B, V].

Those that say which tokens are drawn from stand in `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from opt_core.generation import processors as p
from opt_torch.generation import sampling
from opt_torch.generation.state import DecodeState, sent

#: The dtypes of `p.Endings`.
ENDINGS = (np.int64, np.int64, np.int64, np.float32)


def guidance(processor: p.Guidance, scores: Tensor, state: DecodeState) -> Tensor:
    scores = torch.log_softmax(scores, dim=-1)
    unconditional = torch.log_softmax(state.unconditional.float(), dim=-1)
    return processor.scale * (scores - unconditional) + unconditional


def sequence_bias(processor: p.SequenceBias, scores: Tensor, state: DecodeState) -> Tensor:
    prefixes, lengths, tokens, biases = (
        sent(np.array(x, dtype), scores.device)
        for x, dtype in zip(processor.endings(), ENDINGS, strict=True)
    )
    last = _last_tokens(state, prefixes.shape[1])[:, None]  # [B, 1, longest]
    fits = torch.all((prefixes < 0) | (last == prefixes), dim=-1)  # [B, n]
    counts = torch.sum(_real(state, state.length), dim=-1, keepdim=True)  # [B, 1]
    values = torch.where(fits & (counts >= lengths), biases, 0.0)
    return scores + _totals(tokens.expand(values.shape), values, scores.shape[-1])


def diversity(processor: p.Diversity, scores: Tensor, state: DecodeState) -> Tensor:
    if state.chosen is None:
        return scores
    ones = torch.ones(state.chosen.shape, device=scores.device)
    counts = _totals(state.chosen, ones, scores.shape[-1])  # [prompts, V]
    counts = torch.repeat_interleave(counts, len(scores) // len(counts), dim=0)
    return scores - processor.penalty * counts


def prompt_repetition_penalty(
    processor: p.PromptRepetitionPenalty, scores: Tensor, state: DecodeState
) -> Tensor:
    return _penalized(scores, state, _real(state, state.prompt_length), 1 / processor.penalty)


def repetition_penalty(
    processor: p.RepetitionPenalty, scores: Tensor, state: DecodeState
) -> Tensor:
    return _penalized(scores, state, _real(state, state.length), processor.penalty)


def no_repeat_n_gram(processor: p.NoRepeatNGram, scores: Tensor, state: DecodeState) -> Tensor:
    before = processor.size - 1  # tokens before the last one of an n-gram
    count = state.tokens.shape[1] - before  # n-grams that the columns have room for
    if count < 1:
        return scores
    real, last = _real(state, state.length), _last_tokens(state, before)
    repeats = (real[:, :count] * real[:, before:]) > 0  # [B, count]
    for index in range(before):
        repeats &= state.tokens[:, index : index + count] == last[:, index : index + 1]
    hits = _totals(state.tokens[:, before:], repeats.int(), scores.shape[-1])
    return torch.where(hits > 0, -torch.inf, scores)


def min_length(processor: p.MinLength, scores: Tensor, state: DecodeState) -> Tensor:
    is_short = state.length - state.offset < processor.length
    return _forbidden(scores, processor.eos_token_ids, is_short)


def min_new_tokens(processor: p.MinNewTokens, scores: Tensor, state: DecodeState) -> Tensor:
    return _forbidden(scores, processor.eos_token_ids, state.step < processor.count)


def prefix_allowed(processor: p.PrefixAllowed, scores: Tensor, state: DecodeState) -> Tensor:
    tokens, mask = state.tokens[:, : state.length], state.mask[:, : state.length]
    rows = [tokens[row][mask[row] > 0] for row in range(len(tokens))]
    allowed = [processor.allowed(i, row, scores.shape[-1]) for i, row in enumerate(rows)]
    is_allowed = sent(np.stack(allowed), scores.device)
    return torch.where(is_allowed, scores, -torch.inf)


def forced_bos(processor: p.ForcedBOS, scores: Tensor, state: DecodeState) -> Tensor:
    return _forced(scores, (processor.token_id,), state.length - state.offset == 1)


def forced_eos(processor: p.ForcedEOS, scores: Tensor, state: DecodeState) -> Tensor:
    return _forced(scores, processor.token_ids, state.step == state.limit - 1)


def remove_invalid(processor: p.RemoveInvalid, scores: Tensor, state: DecodeState) -> Tensor:
    limits = torch.finfo(scores.dtype)
    return torch.clamp(torch.where(torch.isnan(scores), 0.0, scores), limits.min, limits.max)


def length_decay(processor: p.LengthDecay, scores: Tensor, state: DecodeState) -> Tensor:
    gain = processor.gains(state.tokens.shape[1])[state.step]
    ends = _among(processor.eos_token_ids, scores) & (scores > -torch.inf)
    return torch.where(ends, scores + torch.abs(scores) * float(gain), scores)


def suppress(processor: p.Suppress, scores: Tensor, state: DecodeState) -> Tensor:
    return _forbidden(scores, processor.token_ids, True)


def suppress_at_begin(processor: p.SuppressAtBegin, scores: Tensor, state: DecodeState) -> Tensor:
    return _forbidden(scores, processor.token_ids, state.step == processor.step)


def force_tokens(processor: p.ForceTokens, scores: Tensor, state: DecodeState) -> Tensor:
    for column, token_id in processor.tokens:
        scores = _forced(scores, (token_id,), state.length - state.offset == column)
    return scores


def user_defined(processor: p.UserDefined, scores: Tensor, state: DecodeState) -> Tensor:
    tokens = state.tokens[:, state.offset : state.length]
    # The function may write into its arguments, as the reference's processors do.
    return torch.as_tensor(processor.called(tokens.clone(), scores.clone())).to(scores)


def _real(state: DecodeState, end: int) -> Tensor:
    """1 at the tokens [B, S] before the column `end`, 0 at pads and behind it."""
    columns = torch.arange(state.tokens.shape[1], device=state.tokens.device)
    return state.mask * (columns < end)


def _last_tokens(state: DecodeState, count: int) -> Tensor:
    """The last tokens of each row [B, count], -1 where it has fewer."""
    columns = state.length - count + torch.arange(count, device=state.tokens.device)
    places = torch.clamp(columns, min=0)
    is_real = (state.mask[:, places] > 0) & (columns >= 0)
    return torch.where(is_real, state.tokens[:, places], -1)


def _totals(tokens: Tensor, values: Tensor, vocab_size: int) -> Tensor:
    """The sum [B, V] of the values [B, any] that stand at each token [B, any]."""
    totals = torch.zeros((len(tokens), vocab_size), dtype=values.dtype, device=values.device)
    return totals.scatter_add(1, tokens, values)


def _penalized(scores: Tensor, state: DecodeState, real: Tensor, penalty: float) -> Tensor:
    """Scores of tokens at real columns, divided by the penalty or, if negative, multiplied."""
    seen = _totals(state.tokens, real, scores.shape[-1]) > 0  # [B, V]
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _among(token_ids: tuple[int, ...], scores: Tensor) -> Tensor:
    """Which tokens [V] are among the ids."""
    found = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
    return found.index_fill(0, sent(np.array(token_ids, np.int64), scores.device), True)


def _forbidden(scores: Tensor, token_ids: tuple[int, ...], condition: bool) -> Tensor:
    """Where the condition holds, none of the tokens."""
    return torch.where(_among(token_ids, scores), -torch.inf, scores) if condition else scores


def _forced(scores: Tensor, token_ids: tuple[int, ...], condition: bool) -> Tensor:
    """Where the condition holds, nothing but the tokens, all with score 0."""
    forced = torch.where(_among(token_ids, scores), torch.zeros_like(scores), -torch.inf)
    return forced if condition else scores


def is_any_of(tokens: Tensor, token_ids: tuple[int, ...]) -> Tensor:
    """Which tokens [...] are among a few ids: no list of them is copied to an accelerator each time."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for token_id in token_ids:
        found |= tokens == token_id
    return found


APPLY: Mapping[type[p.LogitsProcessor], Callable[..., Tensor]] = {
    p.Guidance: guidance,
    p.SequenceBias: sequence_bias,
    p.Diversity: diversity,
    p.PromptRepetitionPenalty: prompt_repetition_penalty,
    p.RepetitionPenalty: repetition_penalty,
    p.NoRepeatNGram: no_repeat_n_gram,
    p.MinLength: min_length,
    p.MinNewTokens: min_new_tokens,
    p.PrefixAllowed: prefix_allowed,
    p.ForcedBOS: forced_bos,
    p.ForcedEOS: forced_eos,
    p.RemoveInvalid: remove_invalid,
    p.LengthDecay: length_decay,
    p.Suppress: suppress,
    p.SuppressAtBegin: suppress_at_begin,
    p.ForceTokens: force_tokens,
    p.UserDefined: user_defined,
    p.Temperature: sampling.temperature,
    p.TopK: sampling.top_k,
    p.TopP: sampling.top_p,
    p.MinP: sampling.min_p,
    p.Typical: sampling.typical,
    p.Epsilon: sampling.epsilon,
    p.Eta: sampling.eta,
    p.Renormalize: sampling.renormalize,
}


def process(
    processors: tuple[p.LogitsProcessor, ...], scores: Tensor, state: DecodeState
) -> Tensor:
    """Applies the processors in order to scores [B, V], in float32."""
    scores = scores.float()
    for processor in processors:
        scores = APPLY[type(processor)](processor, scores, state)
    return scores
