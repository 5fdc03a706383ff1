# SPDX-License-Identifier: Apache-2.0
"""How each processor of `opt_core.generation.processors` changes the scores [B, V].

Those that say which tokens are drawn from stand in `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from opt_core.generation import processors as p
from opt_flax.generation import sampling
from opt_flax.generation.state import DecodeState

#: The dtypes of `p.Endings`.
ENDINGS = (jnp.int32, jnp.int32, jnp.int32, jnp.float32)


def guidance(processor: p.Guidance, scores: Array, state: DecodeState) -> Array:
    scores = jax.nn.log_softmax(scores, axis=-1)
    unconditional = jax.nn.log_softmax(state.unconditional.astype(jnp.float32), axis=-1)
    return processor.scale * (scores - unconditional) + unconditional


def sequence_bias(processor: p.SequenceBias, scores: Array, state: DecodeState) -> Array:
    prefixes, lengths, tokens, biases = (
        jnp.array(x, dtype) for x, dtype in zip(processor.endings(), ENDINGS, strict=True)
    )
    last = _last_tokens(state, prefixes.shape[1])[:, None]  # [B, 1, longest]
    fits = jnp.all((prefixes < 0) | (last == prefixes), axis=-1)  # [B, n]
    counts = jnp.sum(_real(state, state.length), axis=-1, keepdims=True)  # [B, 1]
    values = jnp.where(fits & (counts >= lengths), biases, 0.0)
    return scores + _totals(jnp.broadcast_to(tokens, values.shape), values, scores.shape[-1])


def diversity(processor: p.Diversity, scores: Array, state: DecodeState) -> Array:
    if state.chosen is None:
        return scores
    ones = jnp.ones(state.chosen.shape)
    counts = _totals(state.chosen, ones, scores.shape[-1])  # [prompts, V]
    counts = jnp.repeat(counts, len(scores) // len(counts), axis=0)
    return scores - processor.penalty * counts


def prompt_repetition_penalty(
    processor: p.PromptRepetitionPenalty, scores: Array, state: DecodeState
) -> Array:
    return _penalized(scores, state, _real(state, state.prompt_length), 1 / processor.penalty)


def repetition_penalty(processor: p.RepetitionPenalty, scores: Array, state: DecodeState) -> Array:
    return _penalized(scores, state, _real(state, state.length), processor.penalty)


def no_repeat_n_gram(processor: p.NoRepeatNGram, scores: Array, state: DecodeState) -> Array:
    before = processor.size - 1  # tokens before the last one of an n-gram
    count = state.tokens.shape[1] - before  # n-grams that the columns have room for
    if count < 1:
        return scores
    real, last = _real(state, state.length), _last_tokens(state, before)
    repeats = (real[:, :count] * real[:, before:]) > 0  # [B, count]
    for index in range(before):
        repeats &= state.tokens[:, index : index + count] == last[:, index : index + 1]
    hits = _totals(state.tokens[:, before:], repeats.astype(jnp.int32), scores.shape[-1])
    return jnp.where(hits > 0, -jnp.inf, scores)


def min_length(processor: p.MinLength, scores: Array, state: DecodeState) -> Array:
    is_short = state.length - state.offset < processor.length
    return _forbidden(scores, processor.eos_token_ids, is_short)


def min_new_tokens(processor: p.MinNewTokens, scores: Array, state: DecodeState) -> Array:
    return _forbidden(scores, processor.eos_token_ids, state.step < processor.count)


def prefix_allowed(processor: p.PrefixAllowed, scores: Array, state: DecodeState) -> Array:
    # In numpy, where another number of columns compiles nothing.
    tokens, mask = (np.asarray(x)[:, : state.length] for x in (state.tokens, state.mask))
    rows = [jnp.asarray(tokens[row][mask[row] > 0]) for row in range(len(tokens))]
    allowed = [processor.allowed(i, row, scores.shape[-1]) for i, row in enumerate(rows)]
    is_allowed = jnp.stack(allowed)
    return jnp.where(is_allowed, scores, -jnp.inf)


def forced_bos(processor: p.ForcedBOS, scores: Array, state: DecodeState) -> Array:
    return _forced(scores, (processor.token_id,), state.length - state.offset == 1)


def forced_eos(processor: p.ForcedEOS, scores: Array, state: DecodeState) -> Array:
    return _forced(scores, processor.token_ids, state.step == state.limit - 1)


def remove_invalid(processor: p.RemoveInvalid, scores: Array, state: DecodeState) -> Array:
    limits = jnp.finfo(scores.dtype)
    return jnp.clip(jnp.where(jnp.isnan(scores), 0.0, scores), limits.min, limits.max)


def length_decay(processor: p.LengthDecay, scores: Array, state: DecodeState) -> Array:
    gain = jnp.asarray(processor.gains(state.tokens.shape[1]))[state.step]
    ends = _among(processor.eos_token_ids, scores) & (scores > -jnp.inf)
    return jnp.where(ends, scores + jnp.abs(scores) * gain, scores)


def suppress(processor: p.Suppress, scores: Array, state: DecodeState) -> Array:
    return _forbidden(scores, processor.token_ids, True)


def suppress_at_begin(processor: p.SuppressAtBegin, scores: Array, state: DecodeState) -> Array:
    return _forbidden(scores, processor.token_ids, state.step == processor.step)


def force_tokens(processor: p.ForceTokens, scores: Array, state: DecodeState) -> Array:
    for column, token_id in processor.tokens:
        scores = _forced(scores, (token_id,), state.length - state.offset == column)
    return scores


def user_defined(processor: p.UserDefined, scores: Array, state: DecodeState) -> Array:
    tokens = jnp.asarray(np.asarray(state.tokens)[:, state.offset : state.length])
    return jnp.asarray(processor.called(tokens, scores), scores.dtype)


def _real(state: DecodeState, end: Array | int) -> Array:
    """1 at the tokens [B, S] before the column `end`, 0 at pads and behind it."""
    columns = jnp.arange(state.tokens.shape[1])
    return state.mask * (columns < end)


def _last_tokens(state: DecodeState, count: int) -> Array:
    """The last tokens of each row [B, count], -1 where it has fewer."""
    columns = state.length - count + jnp.arange(count)
    places = jnp.maximum(columns, 0)
    is_real = (state.mask[:, places] > 0) & (columns >= 0)
    return jnp.where(is_real, state.tokens[:, places], -1)


def _totals(tokens: Array, values: Array, vocab_size: int) -> Array:
    """The sum [B, V] of the values [B, any] that stand at each token [B, any]."""
    totals = jnp.zeros((len(tokens), vocab_size), values.dtype)
    return totals.at[jnp.arange(len(tokens))[:, None], tokens].add(values)


def _penalized(scores: Array, state: DecodeState, real: Array, penalty: float) -> Array:
    """Scores of tokens at real columns, divided by the penalty or, if negative, multiplied."""
    seen = _totals(state.tokens, real, scores.shape[-1]) > 0  # [B, V]
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def _among(token_ids: tuple[int, ...], scores: Array) -> Array:
    """Which tokens [V] are among the ids."""
    found = jnp.zeros(scores.shape[-1], bool)
    return found.at[jnp.array(token_ids)].set(True)


def _forbidden(scores: Array, token_ids: tuple[int, ...], condition: Array | bool) -> Array:
    """Where the condition holds, none of the tokens."""
    return jnp.where(_among(token_ids, scores) & condition, -jnp.inf, scores)


def _forced(scores: Array, token_ids: tuple[int, ...], condition: Array) -> Array:
    """Where the condition holds, nothing but the tokens, all with score 0."""
    forced = jnp.where(_among(token_ids, scores), jnp.zeros_like(scores), -jnp.inf)
    return jnp.where(condition, forced, scores)


APPLY: Mapping[type[p.LogitsProcessor], Callable[..., Array]] = {
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


def process(processors: tuple[p.LogitsProcessor, ...], scores: Array, state: DecodeState) -> Array:
    """Applies the processors in order to scores [B, V], in float32."""
    scores = scores.astype(jnp.float32)
    for processor in processors:
        scores = APPLY[type(processor)](processor, scores, state)
    return scores
