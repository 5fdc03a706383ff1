# SPDX-License-Identifier: Apache-2.0
"""What the tests of the beams' loops share: plans, a table instead of a model, what must be found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.generation import processors as p
from opt_core.generation.plan import DecodePlan
from opt_core.generation.strategies import BeamSearch
from tests.reference.beams import Beam, beam_search

Array = NDArray[Any]

VOCABULARY, PAD, ROOM, LIMIT = 7, 0, 8, 6  # LIMIT new tokens, in buffers with more room
PROMPTS = np.array([[1, 2], [4, 3], [2, 2]])
_RANDOM = np.random.default_rng(4)
#: [V, V, V] logits after two tokens.
TABLE = (1.5 * _RANDOM.normal(size=(VOCABULARY,) * 3)).astype(np.float32)
TABLE[..., 5] += 1.0  # that sequences end

#: Beams, groups, length_penalty, early_stopping, ends; beams that sample are marked.
CASES: dict[str, tuple[int, int, float, bool | str, tuple[int, ...]]] = {
    "plain": (3, 1, 1.0, False, (5,)),
    "at once": (4, 1, 0.0, True, (5, 6)),
    "never": (3, 1, 2.0, "never", (5,)),
    "short": (2, 1, -1.0, "never", (5,)),
    "endless": (3, 1, 1.0, True, ()),
    "groups": (4, 2, 1.0, False, (5,)),
    "groups at once": (4, 2, 0.0, True, (5,)),
    "groups of one": (3, 3, 1.0, "never", (6, 5, 4)),
    "sampled": (3, 1, 1.0, False, (5,)),
    "sampled, many ends": (2, 1, 1.0, False, (1, 4, 5, 6)),
}
#: Those for backends where each of them is a program to compile.
COMPILED_CASES = ("groups at once", "groups of one", "sampled, many ends")


def plan_for(case: str) -> DecodePlan:
    beams, groups, length_penalty, early_stopping, eos = CASES[case]
    strategy = BeamSearch(
        rows=beams,
        do_sample="sampled" in case,
        num_groups=groups,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    return DecodePlan(
        strategy=strategy,
        processors=(p.Diversity(0.7),) if groups > 1 else (),
        prompt_length=PROMPTS.shape[1],
        max_new_tokens=ROOM,
        eos_token_ids=eos,
        pad_token_id=PAD,
        num_return_sequences=beams,
    )


def gumbel(plan: DecodePlan) -> Array | None:
    """The noise of sampling [steps, rows, V]."""
    if not plan.strategy.do_sample:
        return None
    shape = (ROOM, len(PROMPTS) * plan.strategy.rows, VOCABULARY)
    return np.random.default_rng(5).gumbel(size=shape).astype(np.float32)


def expected(
    plan: DecodePlan, prompt: int, noise: Array | None, stop: int = LIMIT
) -> tuple[list[Beam], int]:
    """What the search with lists finds, and in how many steps."""

    def log_probs(new: Any) -> Array:
        logits = TABLE[tuple([*PROMPTS[prompt], *new][-2:])].astype(np.float64)
        return logits - np.log(np.exp(logits).sum())

    rows = slice(prompt * plan.strategy.rows, (prompt + 1) * plan.strategy.rows)
    plan = replace(plan, max_new_tokens=LIMIT)
    return beam_search(plan, log_probs, None if noise is None else noise[:, rows], stop)


def check(
    plan: DecodePlan, found: Any, noise: Array | None = None, stops: tuple[int, ...] = (LIMIT,) * 3
) -> int:
    """Compares `Decoded` with what the search with lists finds; returns the number of its steps."""
    tokens, scores, indices = (
        np.asarray(x) for x in (found.tokens, found.sequences_scores, found.beam_indices)
    )
    prompts = range(len(PROMPTS))
    searches = [expected(plan, i, noise, stops[i]) for i in prompts]
    beams = [beam for found_there, _ in searches for beam in found_there]
    width = tokens.shape[1]
    assert tokens.tolist() == [[*b.tokens, *[PAD] * (width - len(b.tokens))] for b in beams]
    np.testing.assert_allclose(scores, [beam.score for beam in beams], rtol=1e-5)
    first = np.repeat(prompts, len(beams) // len(prompts)) * plan.strategy.rows
    assert indices.tolist() == [
        [*(i + row for i in b.indices), *[-1] * (width - len(b.indices))]
        for b, row in zip(beams, first.tolist(), strict=True)
    ]
    assert int(found.length) == max(len(beam.tokens) for beam in beams)
    return max(steps for _, steps in searches)


class Stopper:
    """Watches beams, and ends all of the first prompt's at one step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.scores: list[Array] = []

    def chose(self, tokens: Any, scores: Any, logits: Any) -> Array:
        self.scores.append(np.asarray(scores).copy())
        assert tokens.shape == (len(scores), PROMPTS.shape[1] + len(self.scores))
        ends = np.zeros(len(tokens), bool)
        ends[: len(tokens) // len(PROMPTS)] = len(self.scores) == self.step
        return ends

    def check(self, plan: DecodePlan, found: Any) -> None:
        """The rest of the prompts go on, and the scores seen add up to those of the sequences."""
        assert len(self.scores) == check(plan, found, stops=(self.step, LIMIT, LIMIT))
        tokens, indices = np.asarray(found.tokens), np.asarray(found.beam_indices)
        for row, score in enumerate(np.asarray(found.sequences_scores).tolist()):
            length = int((indices[row] >= 0).sum())
            seen = [self.scores[i][indices[row, i], tokens[row, i]] for i in range(length)]
            average = sum(seen) / length**plan.strategy.length_penalty
            np.testing.assert_allclose(average, score, rtol=1e-5)
