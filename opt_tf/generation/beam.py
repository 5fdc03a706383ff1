# SPDX-License-Identifier: Apache-2.0
"""Beam search: alone, in groups that avoid each other's tokens, and with sampling.

B counts prompts here, G the groups of a prompt, M the beams of a group, L the new tokens that there
is room for: row (prompt, group, beam) is number `(prompt * G + group) * M + beam`.
"""

from __future__ import annotations

from typing import NamedTuple

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation.plan import DecodePlan
from opt_core.generation.watching import Watch
from opt_tf.generation.decode import Noise, Step, in_halves, repeat, watched
from opt_tf.generation.processors import is_any_of, process
from opt_tf.generation.state import Decoded, DecodeState

#: The score of all beams of a group but one before the first step, since all are the same.
TWIN_SCORE = -1e9
_MINUS_INF = float("-inf")


class Beams(NamedTuple):
    """Rows continued by one token, the best first in each group."""

    scores: Tensor  # [B, G, any] sums of log-probabilities
    tokens: Tensor  # [B, G, any]
    sources: Tensor  # [B, G, any] the rows that are continued

    def take(self, order: Tensor) -> Beams:
        """Some of each group [B, G, M]."""
        return Beams(*(_pick(field, order) for field in self))


class Hypotheses(NamedTuple):
    """The best sequences of each group that have ended, the worst first."""

    scores: Tensor  # [B, G, M] -inf where there is none
    tokens: Tensor  # [B, G, M, L] new tokens with their end, then pads
    lengths: Tensor  # [B, G, M] of them
    indices: Tensor  # [B, G, M, L] the row that each token was chosen from, -1 after the end

    def merged(self, other: Hypotheses) -> Hypotheses:
        """The best of both; where scores are the same, the other's."""
        both = Hypotheses(*(tf.concat(pair, axis=2) for pair in zip(self, other, strict=True)))
        return both.best(self.scores.shape[2])

    def best(self, count: int) -> Hypotheses:
        """The best `count` of each group."""
        order = tf.argsort(self.scores, stable=True)[..., -count:]
        return Hypotheses(*(_pick(field, order) for field in self))


class BeamState(NamedTuple):
    """The beams, and the sequences found so far."""

    rows: DecodeState
    scores: Tensor  # [B, G, M] sums of log-probabilities
    indices: Tensor  # [B, G, M, L] the row that each token was chosen from
    done: Tensor  # [B, G] whether the group has all its sequences
    hypotheses: Hypotheses

    @property
    def numbers(self) -> Tensor:
        """[B, G, M], the number of each row."""
        shape = self.scores.shape
        return tf.reshape(tf.range(shape.num_elements()), shape)

    def indices_after(self, sources: Tensor) -> Tensor:
        """[B, G, M, L], the indices of rows [B, G, M] continued by one token."""
        room = self.indices.shape[3]
        indices = tf.gather(tf.reshape(self.indices, (-1, room)), sources)
        columns = tf.range(room)  # [L]
        return tf.where(columns == self.rows.step, sources[..., None], indices)


def beam_search(
    plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None, watch: Watch | None
) -> Decoded:
    """Continues the best rows of each prompt, and returns the best sequences that ended.

    A prompt ends when each of its groups has M sequences that no other can surpass, or when the host
    ends all of its rows.
    """

    def goes_on(state: BeamState) -> Tensor:
        return (state.rows.step < state.rows.limit) & ~tf.reduce_all(state.done)

    def advance(state: BeamState) -> BeamState:
        rows = state.rows
        start, size = (0, rows.length - 1), (rows.tokens.shape[0], 1)
        token = tf.slice(rows.tokens, start, size)  # [rows, 1]
        return extended(state._replace(rows=rows.after(step(token, rows.cache))))

    def extended(state: BeamState) -> BeamState:
        drawn = None if noise is None else noise(state.rows.step)  # [rows, V]
        return shown(plan, choose(plan, state, drawn), watch)

    beams = repeat(goes_on, advance, extended(first_beams(plan, state)), watch)
    return decoded(plan, closed(plan, beams, tf.ones_like(beams.done)))


def first_beams(plan: DecodePlan, rows: DecodeState) -> BeamState:
    """The beams before the first step.

    As in the reference, sampling starts from all of them, and else only one of a group counts.
    """
    strategy = plan.strategy
    groups, size = strategy.num_groups, strategy.rows // strategy.num_groups
    shape = (rows.tokens.shape[0] // strategy.rows, groups, size)
    scores = tf.zeros(shape)
    if not strategy.do_sample:
        scores += [0.0, *[TWIN_SCORE] * (size - 1)]
    room = tf.zeros((*shape, plan.max_new_tokens), tf.int32)
    none = Hypotheses(tf.fill(shape, _MINUS_INF), room, tf.zeros(shape, tf.int32), room - 1)
    done = tf.zeros(shape[:2], tf.bool)
    return BeamState(rows, scores, room - 1, done, none)


def choose(plan: DecodePlan, state: BeamState, drawn: Tensor | None) -> BeamState:
    """The state with one more column: each group's best beams that go on.

    Args:
        drawn: [rows, V], the noise of sampling.
    """
    rows = state.rows
    found, going, scores = [], [], []
    for group in range(plan.strategy.num_groups):
        part = rows.take(tf.reshape(state.numbers[:, group], [-1]))
        log_probs = tf.nn.log_softmax(tf.cast(part.logits, tf.float32), axis=-1)
        processed = process(plan.processors, log_probs, part)  # [B x M, V]
        shape = (*state.scores[:, :1].shape, processed.shape[-1])
        scores.append(tf.reshape(processed, shape))  # [B, 1, M, V]
        found.append(candidates(plan, state, group, scores[-1], drawn))
        going.append(unfinished(plan, found[-1], state.done[:, group : group + 1]))
        chosen = tf.concat([beams.tokens[:, 0] for beams in going], axis=1)  # [B, any]
        rows = rows._replace(chosen=chosen)
    best, beams = (
        Beams(*(tf.concat(parts, axis=1) for parts in zip(*groups, strict=True)))
        for groups in (found, going)
    )
    hypotheses, done = ended(plan, state, best)
    rows = reordered(plan, state.rows, beams)._replace(
        finished=tf.repeat(tf.reshape(done, [-1]), state.scores.shape[2]),
        scores=tf.reshape(tf.concat(scores, axis=1), rows.logits.shape),
    )
    indices = state.indices_after(beams.sources)
    return BeamState(rows, beams.scores, indices, done, hypotheses)


def candidates(
    plan: DecodePlan, state: BeamState, group: int, scores: Tensor, drawn: Tensor | None
) -> Beams:
    """The best continuations [B, 1, any] of one group, so many that M of them go on.

    Args:
        scores: [B, 1, M, V], processed log-probabilities.
    """
    numbers = state.numbers[:, group : group + 1]  # [B, 1, M]
    batch, _, size, vocabulary = scores.shape
    totals = scores + state.scores[:, group : group + 1, :, None]
    noisy = totals if drawn is None else totals + tf.gather(drawn, numbers)
    totals, noisy = (tf.reshape(x, (batch, 1, size * vocabulary)) for x in (totals, noisy))
    count = max(2, 1 + len(plan.eos_token_ids)) * size
    places = tf.math.top_k(noisy, count).indices  # [B, 1, any]
    sources = numbers[:, :, :1] + places // vocabulary
    best = Beams(_pick(totals, places), places % vocabulary, sources)
    if drawn is not None:
        # The reference draws 2 M; the others stand in for ends, of which there may be more than M.
        is_spare = tf.range(count) >= 2 * size
        sorted_scores = tf.where(is_spare, _MINUS_INF, best.scores)
        best = best.take(tf.argsort(sorted_scores, direction="DESCENDING", stable=True))
    return best


def unfinished(plan: DecodePlan, best: Beams, done: Tensor) -> Beams:
    """The first M [B, G, M] that do not end; pads where the group is done."""
    order = tf.argsort(tf.cast(_is_end(plan, best.tokens), tf.int32), stable=True)
    size = plan.strategy.rows // plan.strategy.num_groups
    beams, done = best.take(order[..., :size]), done[..., None]
    return Beams(
        tf.where(done, 0.0, beams.scores),
        tf.where(done, plan.pad_token_id, beams.tokens),
        beams.sources,
    )


def ended(plan: DecodePlan, state: BeamState, best: Beams) -> tuple[Hypotheses, Tensor]:
    """The hypotheses with the ends among the first M of each group, and which groups are done."""
    strategy, rows, size = plan.strategy, state.rows, state.scores.shape[2]
    averages = (
        best.scores / tf.cast(rows.step + 1, tf.float32) ** strategy.length_penalty
    )  # [B, G, any]
    sources = best.sources[..., :size]
    ends = _is_end(plan, best.tokens[..., :size]) & ~state.done[..., None]  # [B, G, M]
    scores = tf.where(ends, averages[..., :size], _MINUS_INF)
    found = sequences(plan, rows, sources, scores, state.indices_after(sources))
    hypotheses = state.hypotheses.merged(found)
    worst = hypotheses.scores[..., 0]  # [B, G]
    highest = averages[..., 0]
    if strategy.early_stopping == "never":
        highest = best.scores[..., 0] / tf.cast(rows.limit, tf.float32) ** strategy.length_penalty
    enough = worst > _MINUS_INF
    if strategy.early_stopping is not True:
        enough = enough & (worst >= highest)
    return hypotheses, state.done | enough


def sequences(
    plan: DecodePlan, rows: DecodeState, sources: Tensor, scores: Tensor, indices: Tensor
) -> Hypotheses:
    """Rows [B, G, M] as hypotheses, with an end wherever there is room for one."""
    columns = tf.range(plan.max_new_tokens)  # [L]
    has_room = (columns == rows.step) & (columns < rows.limit)
    tokens = tf.gather(rows.tokens[:, plan.prompt_length :], sources)  # [B, G, M, L]
    end = plan.eos_token_ids[:1] or (plan.pad_token_id,)
    tokens = tf.where(has_room, end[0], tokens)
    length = tf.minimum(rows.step + len(plan.eos_token_ids[:1]), rows.limit)
    return Hypotheses(scores, tokens, tf.fill(sources.shape, length), indices)


def reordered(plan: DecodePlan, rows: DecodeState, beams: Beams) -> DecodeState:
    """The rows that are continued, each with its new token; guides follow their rows."""
    sources, cache = tf.reshape(beams.sources, [-1]), rows.cache  # [rows]
    if cache is not None:
        cache = cache.take(in_halves(plan, sources, sources.shape[0]))
    column = tf.reshape(beams.tokens, (-1, 1))
    tokens = keras.ops.slice_update(tf.gather(rows.tokens, sources), (0, rows.length), column)
    return rows._replace(tokens=tokens, length=rows.length + 1, cache=cache)


def shown(plan: DecodePlan, state: BeamState, watch: Watch | None) -> BeamState:
    """Shows a state with a new column to the host, which may end all rows of a prompt."""
    if watch is None:
        return state
    rows = watched(state.rows, watch)
    ends = tf.reshape(rows.finished, (state.done.shape[0], -1))
    stopped = tf.reduce_all(ends, axis=1, keepdims=True)  # [B, 1]
    return closed(plan, state._replace(rows=rows), stopped)


def closed(plan: DecodePlan, state: BeamState, stopped: Tensor) -> BeamState:
    """The state with the beams of some groups [B, 1 or G] among the hypotheses, as they are."""
    averages = state.scores / tf.cast(state.rows.step, tf.float32) ** plan.strategy.length_penalty
    open_groups = (stopped & ~state.done)[..., None]
    scores = tf.where(open_groups, averages, _MINUS_INF)
    found = sequences(plan, state.rows, state.numbers, scores, state.indices)
    return state._replace(hypotheses=state.hypotheses.merged(found), done=state.done | stopped)


def decoded(plan: DecodePlan, state: BeamState) -> Decoded:
    """The best sequences of each prompt, from all of its groups, the best first."""
    found = Hypotheses(
        *(tf.reshape(x, (x.shape[0], 1, -1, *x.shape[3:])) for x in state.hypotheses)
    )
    found = found.best(plan.num_return_sequences)
    found = Hypotheses(*(tf.reshape(tf.reverse(x, [2]), (-1, *x.shape[3:])) for x in found))
    length = tf.reduce_max(found.lengths)
    return Decoded(found.tokens, length, state.rows.cache, found.scores, found.indices)


def _is_end(plan: DecodePlan, tokens: Tensor) -> Tensor:
    return is_any_of(tokens, plan.eos_token_ids)


def _pick(values: Tensor, order: Tensor) -> Tensor:
    """The places `order` [B, G, any] of values [B, G, any] or [B, G, any, L]."""
    return tf.gather(values, order, batch_dims=2)
