# SPDX-License-Identifier: Apache-2.0
"""The logits processors in float64 numpy: what `opt_core.generation.processors` means, row by row.

A row is a list of its real tokens: padding does not exist here. The definitions follow the
reference's classes, and the papers that `opt_core` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.generation import processors as p

Array = NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One row, and where it stands.

    Attributes:
        tokens: all, from the first.
        prompt: those of the prompt.
        columns: of the batch, from the first that counts, its padding included.
        step: new tokens so far.
        limit: new tokens allowed.
        unconditional: [V] logits without the prompt.
        chosen: tokens that earlier groups chose for this column.
        index: the number of the row in the batch.
    """

    tokens: list[int]
    prompt: list[int]
    columns: int
    step: int
    limit: int
    unconditional: Array | None = None
    chosen: tuple[int, ...] = ()
    index: int = 0


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def log_softmax(scores: Array) -> Array:
    return scores - scores.max() - math.log(np.exp(scores - scores.max()).sum())


def entropy(scores: Array) -> float:
    return -sum(
        probability * math.log(probability) for probability in softmax(scores) if probability
    )


def without(scores: Array, tokens: Any) -> Array:
    """The scores, -inf at the tokens."""
    return np.array([-math.inf if i in tokens else score for i, score in enumerate(scores)])


def only(scores: Array, tokens: Any) -> Array:
    """0 at the tokens, -inf elsewhere."""
    return np.array([0.0 if i in tokens else -math.inf for i in range(len(scores))])


def guidance(processor: p.Guidance, scores: Array, row: Row) -> Array:
    without_prompt = log_softmax(np.asarray(row.unconditional))
    return without_prompt + processor.scale * (log_softmax(scores) - without_prompt)


def sequence_bias(processor: p.SequenceBias, scores: Array, row: Row) -> Array:
    result = scores.copy()
    for ids, bias in processor.biases:
        prefix = list(ids[:-1])
        if not prefix or (len(row.tokens) >= len(ids) and row.tokens[-len(prefix) :] == prefix):
            result[ids[-1]] += bias
    return result


def diversity(processor: p.Diversity, scores: Array, row: Row) -> Array:
    result = scores.copy()
    for token in row.chosen:
        result[token] -= processor.penalty
    return result


def penalized(scores: Array, tokens: list[int], penalty: float) -> Array:
    result = scores.copy()
    for token in set(tokens):
        result[token] *= penalty if scores[token] < 0 else 1 / penalty
    return result


def prompt_repetition_penalty(
    processor: p.PromptRepetitionPenalty, scores: Array, row: Row
) -> Array:
    return penalized(scores, row.prompt, 1 / processor.penalty)


def repetition_penalty(processor: p.RepetitionPenalty, scores: Array, row: Row) -> Array:
    return penalized(scores, row.tokens, processor.penalty)


def no_repeat_n_gram(processor: p.NoRepeatNGram, scores: Array, row: Row) -> Array:
    size, tokens = processor.size, row.tokens
    seen = {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}
    before = tuple(tokens[len(tokens) - size + 1 :]) if len(tokens) >= size else ()
    return without(scores, [i for i in range(len(scores)) if (*before, i) in seen])


def min_length(processor: p.MinLength, scores: Array, row: Row) -> Array:
    return without(scores, processor.eos_token_ids if row.columns < processor.length else ())


def min_new_tokens(processor: p.MinNewTokens, scores: Array, row: Row) -> Array:
    return without(scores, processor.eos_token_ids if row.step < processor.count else ())


def prefix_allowed(processor: p.PrefixAllowed, scores: Array, row: Row) -> Array:
    allowed = processor.function(row.index // processor.rows_per_prompt, row.tokens)
    return without(scores, set(range(len(scores))) - set(allowed))


def forced_bos(processor: p.ForcedBOS, scores: Array, row: Row) -> Array:
    return only(scores, (processor.token_id,)) if row.columns == 1 else scores


def forced_eos(processor: p.ForcedEOS, scores: Array, row: Row) -> Array:
    return only(scores, processor.token_ids) if row.step == row.limit - 1 else scores


def remove_invalid(processor: p.RemoveInvalid, scores: Array, row: Row) -> Array:
    highest = float(np.finfo(np.float32).max)
    return np.array([0.0 if s != s else min(max(s, -highest), highest) for s in scores])


def length_decay(processor: p.LengthDecay, scores: Array, row: Row) -> Array:
    result = scores.copy()
    if row.step > processor.start:
        gain = processor.factor ** (row.step - processor.start) - 1
        for token in set(processor.eos_token_ids):
            if scores[token] != -math.inf:
                result[token] += abs(scores[token]) * gain
    return result


def suppress(processor: p.Suppress, scores: Array, row: Row) -> Array:
    return without(scores, processor.token_ids)


def suppress_at_begin(processor: p.SuppressAtBegin, scores: Array, row: Row) -> Array:
    return without(scores, processor.token_ids if row.step == processor.step else ())


def force_tokens(processor: p.ForceTokens, scores: Array, row: Row) -> Array:
    token = dict(processor.tokens).get(row.columns)
    return scores if token is None else only(scores, (token,))


def user_defined(processor: p.UserDefined, scores: Array, row: Row) -> Array:
    return np.asarray(processor.function(np.array([row.tokens]), scores[None]))[0]


def temperature(processor: p.Temperature, scores: Array, row: Row) -> Array:
    return scores / processor.temperature


def top_k(processor: p.TopK, scores: Array, row: Row) -> Array:
    lowest = sorted(scores, reverse=True)[processor.k - 1]
    return without(scores, [i for i, score in enumerate(scores) if score < lowest])


def of_mass(ranks: Array, scores: Array, mass: float, keep: int) -> Array:
    """The scores of the fewest tokens of the highest ranks that have this probability together."""
    probabilities, total, kept = softmax(scores), 0.0, []
    for token in sorted(range(len(scores)), key=lambda token: -ranks[token]):
        if total >= mass and len(kept) >= keep:
            break
        total += probabilities[token]
        kept.append(token)
    lowest = min(ranks[token] for token in kept)
    return without(scores, [i for i, rank in enumerate(ranks) if rank < lowest])


def top_p(processor: p.TopP, scores: Array, row: Row) -> Array:
    return of_mass(scores, scores, processor.p, processor.keep)


def typical(processor: p.Typical, scores: Array, row: Row) -> Array:
    ranks = -abs(-log_softmax(scores) - entropy(scores))
    return of_mass(ranks, scores, processor.mass, processor.keep)


def at_least(cutoff: float, scores: Array, keep: int) -> Array:
    """The scores of tokens of at least this probability, and of the likeliest."""
    lowest, probabilities = sorted(scores, reverse=True)[keep - 1], softmax(scores)
    removed = [i for i, s in enumerate(scores) if probabilities[i] < cutoff and s < lowest]
    return without(scores, removed)


def min_p(processor: p.MinP, scores: Array, row: Row) -> Array:
    return at_least(processor.p * max(softmax(scores)), scores, processor.keep)


def epsilon(processor: p.Epsilon, scores: Array, row: Row) -> Array:
    return at_least(processor.cutoff, scores, processor.keep)


def eta(processor: p.Eta, scores: Array, row: Row) -> Array:
    cutoff = min(processor.cutoff, math.sqrt(processor.cutoff) * math.exp(-entropy(scores)))
    return at_least(cutoff, scores, processor.keep)


def renormalize(processor: p.Renormalize, scores: Array, row: Row) -> Array:
    return log_softmax(scores)


DEFINITIONS: Mapping[type[p.LogitsProcessor], Callable[..., Array]] = {
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
    p.Temperature: temperature,
    p.TopK: top_k,
    p.TopP: top_p,
    p.MinP: min_p,
    p.Typical: typical,
    p.Epsilon: epsilon,
    p.Eta: eta,
    p.Renormalize: renormalize,
}


def process(processor: p.LogitsProcessor, scores: Array, rows: list[Row]) -> Array:
    """The scores [B, V] after the processor."""
    define = DEFINITIONS[type(processor)]
    return np.stack([define(processor, scores[row.index].astype(float), row) for row in rows])
