# SPDX-License-Identifier: Apache-2.0
"""Beam search: alone, in groups that avoid each other's tokens, and with sampling.

B counts prompts here, G the groups of a prompt, M the beams of a group, L the new tokens that there
is room for: row (prompt, group, beam) is number `(prompt * G + group) * M + beam`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from opt_core.generation.plan import DecodePlan
from opt_core.generation.watching import Watch
from opt_torch.generation.decode import Noise, Step, in_halves, repeat, watched
from opt_torch.generation.processors import is_any_of, process
from opt_torch.generation.state import Decoded, DecodeState

#: The score of all beams of a group but one before the first step, since all are the same.
TWIN_SCORE = -1e9


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
        both = Hypotheses(*(torch.cat(pair, dim=2) for pair in zip(self, other, strict=True)))
        return both.best(self.scores.shape[2])

    def best(self, count: int) -> Hypotheses:
        """The best `count` of each group."""
        order = torch.argsort(self.scores, dim=-1, stable=True)[..., -count:]
        return Hypotheses(*(_pick(field, order) for field in self))


@dataclass(frozen=True)
class BeamState:
    """The beams, and the sequences found so far."""

    rows: DecodeState
    scores: Tensor  # [B, G, M] sums of log-probabilities
    indices: Tensor  # [B, G, M, L] the row that each token was chosen from
    done: Tensor  # [B, G] whether the group has all its sequences
    hypotheses: Hypotheses

    @property
    def numbers(self) -> Tensor:
        """[B, G, M], the number of each row."""
        count = self.scores.numel()
        return torch.arange(count, device=self.scores.device).reshape(self.scores.shape)

    def indices_after(self, sources: Tensor) -> Tensor:
        """[B, G, M, L], the indices of rows [B, G, M] continued by one token."""
        room = self.indices.shape[3]
        indices = self.indices.reshape(-1, room)[sources]
        columns = torch.arange(room, device=sources.device)  # [L]
        return torch.where(columns == self.rows.step, sources[..., None], indices)


def beam_search(
    plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None, watch: Watch | None
) -> Decoded:
    """Continues the best rows of each prompt, and returns the best sequences that ended.

    A prompt ends when each of its groups has M sequences that no other can surpass, or when the host
    ends all of its rows.
    """

    def goes_on(state: BeamState) -> bool:
        return state.rows.step < state.rows.limit and not bool(state.done.all())

    def advance(state: BeamState) -> BeamState:
        rows = state.rows
        token = rows.tokens[:, rows.length - 1 : rows.length]  # [rows, 1]
        return extended(replace(state, rows=rows.after(step(token, rows.cache))))

    def extended(state: BeamState) -> BeamState:
        drawn = None if noise is None else noise(state.rows.step)  # [rows, V]
        return shown(plan, choose(plan, state, drawn), watch)

    beams = repeat(goes_on, advance, extended(first_beams(plan, state)), watch)
    return decoded(plan, closed(plan, beams, torch.ones_like(beams.done)))


def first_beams(plan: DecodePlan, rows: DecodeState) -> BeamState:
    """The beams before the first step.

    As in the reference, sampling starts from all of them, and else only one of a group counts.
    """
    strategy = plan.strategy
    groups, size = strategy.num_groups, strategy.rows // strategy.num_groups
    shape = (len(rows.tokens) // strategy.rows, groups, size)
    scores = torch.zeros(shape, device=rows.tokens.device)
    if not strategy.do_sample:
        scores[:, :, 1:] = TWIN_SCORE
    room = rows.tokens.new_zeros((*shape, plan.max_new_tokens))
    none = Hypotheses(
        torch.full_like(scores, -torch.inf), room, rows.tokens.new_zeros(shape), room - 1
    )
    done = torch.zeros(shape[:2], dtype=torch.bool, device=scores.device)
    return BeamState(rows, scores, room - 1, done, none)


def choose(plan: DecodePlan, state: BeamState, drawn: Tensor | None) -> BeamState:
    """The state with one more column: each group's best beams that go on.

    Args:
        drawn: [rows, V], the noise of sampling.
    """
    rows = state.rows
    found, going, scores = [], [], []
    for group in range(plan.strategy.num_groups):
        part = rows.take(state.numbers[:, group].flatten())
        log_probs = torch.log_softmax(part.logits.float(), dim=-1)
        processed = process(plan.processors, log_probs, part)  # [B x M, V]
        scores.append(processed.reshape(*state.scores[:, :1].shape, -1))  # [B, 1, M, V]
        found.append(candidates(plan, state, group, scores[-1], drawn))
        going.append(unfinished(plan, found[-1], state.done[:, group : group + 1]))
        chosen = torch.cat([beams.tokens[:, 0] for beams in going], dim=1)  # [B, any]
        rows = replace(rows, chosen=chosen)
    best, beams = (
        Beams(*(torch.cat(parts, dim=1) for parts in zip(*groups, strict=True)))
        for groups in (found, going)
    )
    hypotheses, done = ended(plan, state, best)
    rows = replace(
        reordered(plan, state.rows, beams),
        finished=done.flatten().repeat_interleave(state.scores.shape[2]),
        scores=torch.cat(scores, dim=1).reshape(len(rows.tokens), -1),
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
    noisy = totals if drawn is None else totals + drawn[numbers]
    totals, noisy = (x.reshape(batch, 1, size * vocabulary) for x in (totals, noisy))
    count = max(2, 1 + len(plan.eos_token_ids)) * size
    places = torch.topk(noisy, count).indices  # [B, 1, any]
    sources = numbers[:, :, :1] + places // vocabulary
    best = Beams(_pick(totals, places), places % vocabulary, sources)
    if drawn is not None:
        # The reference draws 2 M; the others stand in for ends, of which there may be more than M.
        is_spare = torch.arange(count, device=places.device) >= 2 * size
        sorted_scores = torch.where(is_spare, -torch.inf, best.scores)
        best = best.take(torch.argsort(sorted_scores, dim=-1, descending=True, stable=True))
    return best


def unfinished(plan: DecodePlan, best: Beams, done: Tensor) -> Beams:
    """The first M [B, G, M] that do not end; pads where the group is done."""
    order = torch.argsort(_is_end(plan, best.tokens).int(), dim=-1, stable=True)
    size = plan.strategy.rows // plan.strategy.num_groups
    beams, done = best.take(order[..., :size]), done[..., None]
    return Beams(
        torch.where(done, 0.0, beams.scores),
        torch.where(done, plan.pad_token_id, beams.tokens),
        beams.sources,
    )


def ended(plan: DecodePlan, state: BeamState, best: Beams) -> tuple[Hypotheses, Tensor]:
    """The hypotheses with the ends among the first M of each group, and which groups are done."""
    strategy, rows, size = plan.strategy, state.rows, state.scores.shape[2]
    averages = best.scores / float(rows.step + 1) ** strategy.length_penalty  # [B, G, any]
    sources = best.sources[..., :size]
    ends = _is_end(plan, best.tokens[..., :size]) & ~state.done[..., None]  # [B, G, M]
    scores = torch.where(ends, averages[..., :size], -torch.inf)
    found = sequences(plan, rows, sources, scores, state.indices_after(sources))
    hypotheses = state.hypotheses.merged(found)
    worst = hypotheses.scores[..., 0]  # [B, G]
    highest = averages[..., 0]
    if strategy.early_stopping == "never":
        highest = best.scores[..., 0] / float(rows.limit) ** strategy.length_penalty
    enough = worst > -torch.inf
    if strategy.early_stopping is not True:
        enough = enough & (worst >= highest)
    return hypotheses, state.done | enough


def sequences(
    plan: DecodePlan, rows: DecodeState, sources: Tensor, scores: Tensor, indices: Tensor
) -> Hypotheses:
    """Rows [B, G, M] as hypotheses, with an end wherever there is room for one."""
    columns = torch.arange(plan.max_new_tokens, device=sources.device)  # [L]
    has_room = (columns == rows.step) & (columns < rows.limit)
    tokens = rows.tokens[:, plan.prompt_length :][sources]  # [B, G, M, L]
    end = plan.eos_token_ids[:1] or (plan.pad_token_id,)
    tokens = torch.where(has_room, end[0], tokens)
    length = min(rows.step + len(plan.eos_token_ids[:1]), rows.limit)
    return Hypotheses(scores, tokens, torch.full_like(sources, length), indices)


def reordered(plan: DecodePlan, rows: DecodeState, beams: Beams) -> DecodeState:
    """The rows that are continued, each with its new token; guides follow their rows."""
    sources, cache = beams.sources.flatten(), rows.cache  # [rows]
    if cache is not None:
        cache = cache.take(in_halves(plan, sources, len(sources)))
    tokens = rows.tokens[sources]
    tokens[:, rows.length] = beams.tokens.flatten()
    return replace(rows, tokens=tokens, length=rows.length + 1, cache=cache)


def shown(plan: DecodePlan, state: BeamState, watch: Watch | None) -> BeamState:
    """Shows a state with a new column to the host, which may end all rows of a prompt."""
    if watch is None:
        return state
    rows = watched(state.rows, watch)
    stopped = rows.finished.reshape(len(state.done), -1).all(dim=1, keepdim=True)  # [B, 1]
    return closed(plan, replace(state, rows=rows), stopped)


def closed(plan: DecodePlan, state: BeamState, stopped: Tensor) -> BeamState:
    """The state with the beams of some groups [B, 1 or G] among the hypotheses, as they are."""
    averages = state.scores / float(state.rows.step) ** plan.strategy.length_penalty
    open_groups = (stopped & ~state.done)[..., None]
    scores = torch.where(open_groups, averages, -torch.inf)
    found = sequences(plan, state.rows, state.numbers, scores, state.indices)
    return replace(state, hypotheses=state.hypotheses.merged(found), done=state.done | stopped)


def decoded(plan: DecodePlan, state: BeamState) -> Decoded:
    """The best sequences of each prompt, from all of its groups, the best first."""
    found = Hypotheses(*(x.reshape(len(x), 1, -1, *x.shape[3:]) for x in state.hypotheses))
    found = found.best(plan.num_return_sequences)
    found = Hypotheses(*(x.flip(2).reshape(-1, *x.shape[3:]) for x in found))
    length = int(found.lengths.max())
    return Decoded(found.tokens, length, state.rows.cache, found.scores, found.indices)


def _is_end(plan: DecodePlan, tokens: Tensor) -> Tensor:
    return is_any_of(tokens, plan.eos_token_ids)


def _pick(values: Tensor, order: Tensor) -> Tensor:
    """The places `order` [B, G, any] of values [B, G, any] or [B, G, any, L]."""
    return torch.take_along_dim(
        values, order.reshape(order.shape + (1,) * (values.ndim - 3)), dim=2
    )
