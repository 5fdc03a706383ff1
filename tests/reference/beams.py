# SPDX-License-Identifier: Apache-2.0
"""Beam search of one prompt with lists: the executable specification of the three backends' loops.

It follows the scorer of the reference (`generation/beam_search.py`): sequences that end are added to a
short list of their group one after the other, and the worst drops out where there are too many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.generation import processors as p
from opt_core.generation.plan import DecodePlan

Array = NDArray[Any]
LogProbs = Callable[[Sequence[int]], Array]  # of the next token [V], after new tokens


@dataclass(frozen=True)
class Beam:
    """New tokens, and the beam that each was chosen from."""

    score: float
    tokens: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()

    def extended(self, score: float, token: int, index: int) -> Beam:
        return Beam(score, (*self.tokens, token), (*self.indices, index))


@dataclass
class Group:
    """Beams that compete with each other, and the best sequences that have ended."""

    first: int  # the number of the first beam
    beams: list[Beam]
    ended: list[Beam] = field(default_factory=list)
    done: bool = False

    def add(self, plan: DecodePlan, beam: Beam, length: int) -> None:
        """Takes a sequence of `length` tokens, its end included, if it is among the best."""
        end = plan.eos_token_ids[:1] if len(beam.tokens) < plan.max_new_tokens else ()
        score = beam.score / length**plan.strategy.length_penalty
        both = [*self.ended, Beam(score, beam.tokens + end, beam.indices)]
        self.ended = sorted(both, key=lambda beam: beam.score)[-len(self.beams) :]

    def advance(self, plan: DecodePlan, scores: Array, noise: Array | None, step: int) -> None:
        """One more token, from log-probabilities [M, V]."""
        size, ends = len(self.beams), plan.eos_token_ids
        totals = scores + np.array([[beam.score] for beam in self.beams])
        order = np.argsort(-(totals if noise is None else totals + noise).ravel())
        best = order[: max(2, 1 + len(ends)) * size].tolist()
        if noise is not None:  # two are drawn for each beam; others where too many of them are ends
            best[: 2 * size] = sorted(best[: 2 * size], key=lambda place: -totals.flat[place])
        following: list[Beam] = []
        for rank, place in enumerate(best):
            beam, token = divmod(place, scores.shape[1])
            old = self.beams[beam]
            new = old.extended(float(totals.flat[place]), token, self.first + beam)
            if token not in ends:
                following.append(new)
            elif rank < size:
                self.add(plan, Beam(new.score, old.tokens, new.indices), step + 1)
        self.beams = following[:size]
        self.done = len(self.ended) == size and self.is_enough(
            plan, float(totals.flat[best[0]]), step + 1
        )

    def is_enough(self, plan: DecodePlan, highest: float, length: int) -> bool:
        """Whether nothing better is expected."""
        strategy = plan.strategy
        if strategy.early_stopping is True:
            return True
        if strategy.early_stopping == "never" and strategy.length_penalty > 0:
            length = plan.max_new_tokens
        return self.ended[0].score >= highest / length**strategy.length_penalty


def beam_search(
    plan: DecodePlan, log_probs: LogProbs, noise: Array | None, stop: int
) -> tuple[list[Beam], int]:
    """The best sequences, the best first, each with an end wherever there is room for it.

    Args:
        plan: whose only processor may be `Diversity`.
        noise: [steps, beams, V], of sampling.
        stop: the step after which all beams are taken as they are.

    Returns:
        The sequences, and the number of steps.
    """
    strategy = plan.strategy
    size = strategy.rows // strategy.num_groups
    others = [Beam(0.0 if strategy.do_sample else -1e9)] * (size - 1)
    firsts = range(0, strategy.rows, size)
    groups = [Group(first, [Beam(0.0), *others]) for first in firsts]
    step = 0
    while step < stop and not all(group.done for group in groups):
        chosen: list[int] = []
        for group in groups:
            if group.done:
                chosen += [plan.pad_token_id] * size
                continue
            scores = np.array([log_probs(beam.tokens) for beam in group.beams])  # [M, V]
            for processor in plan.processors:
                assert isinstance(processor, p.Diversity)
                np.subtract.at(scores, (slice(None), chosen), processor.penalty)
            place = slice(group.first, group.first + size)
            group.advance(plan, scores, None if noise is None else noise[step, place], step)
            chosen += [beam.tokens[-1] for beam in group.beams]
        step += 1
    for group in groups:
        for beam in () if group.done else group.beams:
            group.add(plan, beam, step)
    found = [beam for group in groups for beam in group.ended]
    found = sorted(found, key=lambda beam: beam.score)[: -plan.num_return_sequences - 1 : -1]
    return found, step
