# SPDX-License-Identifier: Apache-2.0
"""Which beams go on under constraints, and which sequences come out: numpy, for all backends.

In each step, a prompt's candidates are its best non-final tokens and, for each row, the tokens that
its constraints propose. They are sorted into banks by how many steps towards the constraints have
been made, and taken from the banks in turn: the best of each, then the second best, and so on
(arXiv:1804.06609). Tokens and scores are those of transformers 4.37.2
(`generation/beam_search.py:ConstrainedBeamSearchScorer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import InputError
from opt_core.generation.constraints import Progress
from opt_core.generation.plan import DecodePlan
from opt_core.generation.strategies import ConstrainedBeamSearch

Array = NDArray[Any]
#: The score of all rows of a prompt but the first, before they differ.
UNUSED = -1e9


class Candidates(NamedTuple):
    """Rows, each with a next token and the score of both, [any]."""

    rows: Array
    tokens: Array
    scores: Array

    def take(self, order: Array) -> Candidates:
        return Candidates(*(x[order] for x in self))


class Hypothesis(NamedTuple):
    """A sequence without its end: new tokens, the rows that they were chosen in, and its score."""

    score: float
    tokens: Array
    rows: Array


@dataclass
class Hypotheses:
    """The best sequences of a prompt, `strategy.rows` at most.

    Attributes:
        limit: new tokens allowed.
        is_done: whether nothing better can come.
    """

    strategy: ConstrainedBeamSearch
    limit: int
    kept: list[Hypothesis] = field(default_factory=list)
    is_done: bool = False

    def add(self, total: float, length: int, tokens: Array, rows: Array) -> None:
        """Keeps a sequence of a summed score if it is among the best."""
        score = total / length**self.strategy.length_penalty
        is_full = len(self.kept) == self.strategy.rows
        if is_full and score <= self._worst():
            return
        if is_full:
            self.kept.remove(min(self.kept, key=lambda hypothesis: hypothesis.score))
        self.kept.append(Hypothesis(score, tokens, rows))

    def close(self, best: float, length: int) -> None:
        """Notes whether rows of this length, the best with this summed score, are worth going on."""
        if len(self.kept) < self.strategy.rows:
            return
        early, penalty = self.strategy.early_stopping, self.strategy.length_penalty
        if early == "never":
            length = self.limit
        self.is_done = early is True or self._worst() >= best / length**penalty

    def best(self, count: int) -> list[Hypothesis]:
        """The best first; among equals, those found last."""
        return sorted(self.kept, key=lambda hypothesis: hypothesis.score)[::-1][:count]

    def _worst(self) -> float:
        return min(hypothesis.score for hypothesis in self.kept)


class Found(NamedTuple):
    """What constrained beam search ends with."""

    tokens: Array  # [B, any] new tokens, each row filled up with pads
    scores: Array  # [B] float32
    beam_indices: Array  # [B, any] the row of each step, -1 after the end


class ConstrainedBeams:
    """The rows of all prompts between two steps: their scores, new tokens and constraints.

    Attributes:
        scores: [B] float32, of the rows so far.

    Args:
        tokens: [B, T] of the rows, of which those count where `mask` is 1.
        limit: new tokens allowed.

    Raises:
        InputError: constraints that need more tokens than allowed.
    """

    def __init__(self, plan: DecodePlan[Any], tokens: Array, mask: Array, limit: int) -> None:
        self.plan, self.strategy = plan, cast(ConstrainedBeamSearch, plan.strategy)
        beams = self.strategy.rows
        self.scores = np.where(np.arange(len(tokens)) % beams, UNUSED, 0.0).astype(np.float32)
        self.tokens = np.empty((len(tokens), 0), np.int32)  # [B, steps]
        self.indices = np.empty((len(tokens), 0), np.int32)
        prompts = range(0, len(tokens), beams)
        self.hypotheses = [Hypotheses(self.strategy, limit) for _ in prompts]
        rows = [tokens[i][mask[i] == 1].tolist() for i in prompts]
        starts = [Progress.start(self.strategy.constraints, row) for row in rows]
        _check_lengths(starts, limit)
        self.progress = [start for start in starts for _ in range(beams)]
        self.limit = limit

    @property
    def finished(self) -> Array:
        """[B], whether the row's prompt can find no better sequences."""
        done = [hypotheses.is_done for hypotheses in self.hypotheses]
        return np.repeat(done, self.strategy.rows)

    def choose(self, scores: Array) -> tuple[Array, Array]:
        """Chooses the rows that go on, and their next tokens, by the scores [B, V] of all.

        Rows of a prompt that is done go on with pads.
        """
        beams = self.strategy.rows
        rows = np.arange(len(scores))
        tokens = np.full(len(scores), self.plan.pad_token_id)
        self.scores = np.zeros(len(scores), np.float32)
        for prompt, hypotheses in enumerate(self.hypotheses):
            own = slice(prompt * beams, (prompt + 1) * beams)
            if not hypotheses.is_done:
                chosen = self._choose(hypotheses, own.start, scores[own])
                rows[own], tokens[own], self.scores[own] = chosen
        steps = zip(rows.tolist(), tokens.tolist(), strict=True)
        self.progress = [self.progress[row].after(token) for row, token in steps]
        self.tokens = np.concatenate([self.tokens[rows], tokens[:, None]], 1, dtype=np.int32)
        self.indices = np.concatenate([self.indices[rows], rows[:, None]], 1, dtype=np.int32)
        return rows, tokens

    def stop(self, finished: Array) -> None:
        """Ends the prompts all of whose rows [B] are finished, with their rows as they are.

        Where too few of them fulfil the constraints, the others compete with them.
        """
        beams = self.strategy.rows
        for prompt, hypotheses in enumerate(self.hypotheses):
            rows = range(prompt * beams, (prompt + 1) * beams)
            if hypotheses.is_done or not finished[prompt * beams : (prompt + 1) * beams].all():
                continue
            complete = [row for row in rows if self.progress[row].is_complete]
            others = [row for row in rows if row not in complete]
            is_enough = len(complete) >= self.plan.num_return_sequences
            for row in complete if is_enough else [*complete, *others]:
                tokens, indices = self.tokens[row], self.indices[row]
                hypotheses.add(float(self.scores[row]), len(tokens), tokens, indices)
            hypotheses.is_done = True

    def found(self) -> Found:
        """The best sequences of each prompt, each followed by the end of sequence where it fits."""
        self.stop(np.ones(len(self.scores), bool))
        wanted = self.plan.num_return_sequences
        best = [h for hypotheses in self.hypotheses for h in hypotheses.best(wanted)]
        ends = self.plan.eos_token_ids[:1]
        width = min(max(len(h.tokens) for h in best) + len(ends), self.limit)
        tokens = np.full((len(best), width), self.plan.pad_token_id, np.int32)
        indices = np.full((len(best), width), -1, np.int32)
        for row, hypothesis in enumerate(best):
            ended = [*hypothesis.tokens, *ends][:width]
            tokens[row, : len(ended)] = ended
            indices[row, : len(hypothesis.rows)] = hypothesis.rows
        return Found(tokens, np.array([h.score for h in best], np.float32), indices)

    def _choose(self, hypotheses: Hypotheses, first: int, scores: Array) -> Candidates:
        """The next rows of the prompt whose rows start with `first`, by their scores [beams, V]."""
        beams, ends = self.strategy.rows, self.plan.eos_token_ids
        best = _highest(scores, (1 + len(ends)) * beams)
        best = best._replace(rows=best.rows + first)
        length = self.tokens.shape[1] + 1
        is_end = np.isin(best.tokens, ends)
        for rank in np.flatnonzero(is_end[:beams]):
            row = best.rows[rank]
            if self.progress[row].is_complete:
                indices = np.append(self.indices[row], row)
                hypotheses.add(float(best.scores[rank]), length, self.tokens[row], indices)
        hypotheses.close(float(best.scores[0]), length)
        kept = best.take(np.flatnonzero(~is_end)[:beams])
        return self._from_banks(kept, self._proposed(kept, first, scores))

    def _proposed(self, kept: Candidates, first: int, scores: Array) -> tuple[Candidates, Array]:
        """What the constraints propose besides the candidates kept, and the banks [any] of it."""
        contents = [self.tokens[first + i].tobytes() for i in range(len(scores))]
        steps = zip(kept.rows.tolist(), kept.tokens.tolist(), strict=True)
        known = {(contents[row - first], token) for row, token in steps}
        found, banks = [], []
        for beam, content in enumerate(contents):
            for token, bank in self.progress[first + beam].proposals():
                if (content, token) not in known:
                    known.add((content, token))
                    found.append((beam, token))
                    banks.append(bank)
        beams, tokens = np.array(found, int).reshape(-1, 2).T
        return Candidates(beams + first, tokens, scores[beams, tokens]), np.array(banks, int)

    def _from_banks(self, kept: Candidates, proposed: tuple[Candidates, Array]) -> Candidates:
        """As many as `kept`, from all banks in turn."""
        others, banks = proposed
        if not len(banks):
            return kept
        steps = zip(kept.rows.tolist(), kept.tokens.tolist(), strict=True)
        own = [self.progress[row].after(token).bank for row, token in steps]
        banks = np.concatenate([own, banks])
        both = Candidates(*map(np.concatenate, zip(kept, others, strict=True)))
        order = np.argsort(-((banks * 100).astype(np.float32) + both.scores), kind="stable")
        banks = banks[order]
        is_first = np.append(True, banks[1:] != banks[:-1])  # of a run of one bank
        places = np.arange(len(banks))
        places -= np.maximum.accumulate(np.where(is_first, places, 0))
        return both.take(order[np.argsort(places, kind="stable")[: len(kept.rows)]])


def _highest(scores: Array, count: int) -> Candidates:
    """The `count` highest of the scores [beams, V], the highest first; among equals, the first."""
    flat = scores.ravel()
    count = min(count, len(flat))
    enough = np.flatnonzero(flat >= np.partition(flat, -count)[-count])
    places = enough[np.argsort(-flat[enough], kind="stable")[:count]]
    rows, tokens = np.divmod(places, scores.shape[1])
    return Candidates(rows, tokens, flat[places])


def _check_lengths(starts: list[Progress], limit: int) -> None:
    for prompt, start in enumerate(starts):
        if start.fewest > limit:
            raise InputError(
                f"The constraints need at least {start.fewest} new tokens after prompt {prompt}, but "
                f"max_new_tokens or max_length allow {limit}. Raise it, or give fewer constraints."
            )
