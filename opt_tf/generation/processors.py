# SPDX-License-Identifier: Apache-2.0
"""How each processor of `opt_core.generation.processors` changes the scores [B, V].

Those that say which tokens are drawn from stand in `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation import processors as p
from opt_tf.generation import sampling
from opt_tf.generation.state import DecodeState

_MINUS_INF = float("-inf")

#: The dtypes of `p.Endings`.
ENDINGS = (tf.int32, tf.int32, tf.int32, tf.float32)


def guidance(processor: p.Guidance, scores: Tensor, state: DecodeState) -> Tensor:
    scores = tf.nn.log_softmax(scores, axis=-1)
    unconditional = tf.nn.log_softmax(tf.cast(state.unconditional, tf.float32), axis=-1)
    return processor.scale * (scores - unconditional) + unconditional


def sequence_bias(processor: p.SequenceBias, scores: Tensor, state: DecodeState) -> Tensor:
    prefixes, lengths, tokens, biases = (
        tf.convert_to_tensor(x, dtype)
        for x, dtype in zip(processor.endings(), ENDINGS, strict=True)
    )
    last = _last_tokens(state, prefixes.shape[1])[:, None]  # [B, 1, longest]
    fits = tf.reduce_all((prefixes < 0) | (last == prefixes), axis=-1)  # [B, n]
    counts = tf.reduce_sum(_real(state, state.length), axis=-1, keepdims=True)  # [B, 1]
    values = tf.where(fits & (counts >= lengths), biases, 0.0)
    return scores + _totals(tf.broadcast_to(tokens, values.shape), values, scores.shape[-1])


def diversity(processor: p.Diversity, scores: Tensor, state: DecodeState) -> Tensor:
    if state.chosen is None:
        return scores
    ones = tf.ones(state.chosen.shape)
    counts = _totals(state.chosen, ones, scores.shape[-1])  # [prompts, V]
    counts = tf.repeat(counts, scores.shape[0] // counts.shape[0], axis=0)
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
    hits = _totals(state.tokens[:, before:], tf.cast(repeats, tf.int32), scores.shape[-1])
    return tf.where(hits > 0, _MINUS_INF, scores)


def min_length(processor: p.MinLength, scores: Tensor, state: DecodeState) -> Tensor:
    is_short = state.length - state.offset < processor.length
    return _forbidden(scores, processor.eos_token_ids, is_short)


def min_new_tokens(processor: p.MinNewTokens, scores: Tensor, state: DecodeState) -> Tensor:
    return _forbidden(scores, processor.eos_token_ids, state.step < processor.count)


def prefix_allowed(processor: p.PrefixAllowed, scores: Tensor, state: DecodeState) -> Tensor:
    tokens, mask = state.tokens[:, : state.length], state.mask[:, : state.length]
    rows = [tf.boolean_mask(tokens[row], mask[row] > 0) for row in range(len(tokens))]
    allowed = [processor.allowed(i, row, scores.shape[-1]) for i, row in enumerate(rows)]
    is_allowed = tf.stack(allowed)
    return tf.where(is_allowed, scores, _MINUS_INF)


def forced_bos(processor: p.ForcedBOS, scores: Tensor, state: DecodeState) -> Tensor:
    return _forced(scores, (processor.token_id,), state.length - state.offset == 1)


def forced_eos(processor: p.ForcedEOS, scores: Tensor, state: DecodeState) -> Tensor:
    return _forced(scores, processor.token_ids, state.step == state.limit - 1)


def remove_invalid(processor: p.RemoveInvalid, scores: Tensor, state: DecodeState) -> Tensor:
    limits = scores.dtype
    return tf.clip_by_value(tf.where(tf.math.is_nan(scores), 0.0, scores), limits.min, limits.max)


def length_decay(processor: p.LengthDecay, scores: Tensor, state: DecodeState) -> Tensor:
    gain = tf.gather(tf.constant(processor.gains(state.tokens.shape[1])), state.step)
    ends = _among(processor.eos_token_ids, scores) & (scores > _MINUS_INF)
    return tf.where(ends, scores + tf.abs(scores) * gain, scores)


def suppress(processor: p.Suppress, scores: Tensor, state: DecodeState) -> Tensor:
    return _forbidden(scores, processor.token_ids, True)


def suppress_at_begin(processor: p.SuppressAtBegin, scores: Tensor, state: DecodeState) -> Tensor:
    return _forbidden(scores, processor.token_ids, state.step == processor.step)


def force_tokens(processor: p.ForceTokens, scores: Tensor, state: DecodeState) -> Tensor:
    for column, token_id in processor.tokens:
        scores = _forced(scores, (token_id,), state.length - state.offset == column)
    return scores


def user_defined(processor: p.UserDefined, scores: Tensor, state: DecodeState) -> Tensor:
    tokens = state.tokens[:, int(state.offset) : int(state.length)]
    return tf.cast(processor.called(tokens, scores), scores.dtype)


def _real(state: DecodeState, end: Tensor) -> Tensor:
    """1 at the tokens [B, S] before the column `end`, 0 at pads and behind it."""
    columns = tf.range(state.tokens.shape[1])
    return state.mask * tf.cast(columns < end, state.mask.dtype)


def _last_tokens(state: DecodeState, count: int) -> Tensor:
    """The last tokens of each row [B, count], -1 where it has fewer."""
    columns = state.length - count + tf.range(count)
    places = tf.maximum(columns, 0)
    is_real = (tf.gather(state.mask, places, axis=1) > 0) & (columns >= 0)
    return tf.where(is_real, tf.gather(state.tokens, places, axis=1), -1)


def _totals(tokens: Tensor, values: Tensor, vocab_size: int) -> Tensor:
    """The sum [B, V] of the values [B, any] that stand at each token [B, any]."""
    rows = tf.broadcast_to(tf.range(tokens.shape[0])[:, None], tokens.shape)
    places = tf.stack([rows, tokens], axis=-1)  # [B, any, 2]
    return tf.scatter_nd(places, values, (tokens.shape[0], vocab_size))


def _penalized(scores: Tensor, state: DecodeState, real: Tensor, penalty: float) -> Tensor:
    """Scores of tokens at real columns, divided by the penalty or, if negative, multiplied."""
    seen = _totals(state.tokens, real, scores.shape[-1]) > 0  # [B, V]
    return tf.where(seen, tf.where(scores < 0, scores * penalty, scores / penalty), scores)


def _among(token_ids: tuple[int, ...], scores: Tensor) -> Tensor:
    """Which tokens [V] are among the ids."""
    places = tf.convert_to_tensor(token_ids)[:, None]
    return tf.scatter_nd(places, tf.ones(len(token_ids)), scores.shape[-1:]) > 0


def _forbidden(scores: Tensor, token_ids: tuple[int, ...], condition: Tensor | bool) -> Tensor:
    """Where the condition holds, none of the tokens."""
    return tf.where(_among(token_ids, scores) & condition, _MINUS_INF, scores)


def _forced(scores: Tensor, token_ids: tuple[int, ...], condition: Tensor) -> Tensor:
    """Where the condition holds, nothing but the tokens, all with score 0."""
    forced = tf.where(_among(token_ids, scores), tf.zeros_like(scores), _MINUS_INF)
    return tf.where(condition, forced, scores)


def is_any_of(tokens: Tensor, token_ids: tuple[int, ...]) -> Tensor:
    """Whether each token is one of the ids."""
    ids = tf.convert_to_tensor(token_ids, tf.int32)  # [any]
    return tf.reduce_any(tokens[..., None] == tf.cast(ids, tokens.dtype), axis=-1)


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
    scores = tf.cast(scores, tf.float32)
    for processor in processors:
        scores = APPLY[type(processor)](processor, scores, state)
    return scores
