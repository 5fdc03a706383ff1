# SPDX-License-Identifier: Apache-2.0
"""Constraints, how far a row has come with them, and which beams go on because of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_core import (
    Constraint,
    DisjunctiveConstraint,
    GenerationConfig,
    InputError,
    OPTConfig,
    PhrasalConstraint,
)
from opt_core.generation.constrained import ConstrainedBeams, Hypotheses
from opt_core.generation.constraints import Progress, read_constraints
from opt_core.generation.hooks import Hooks
from opt_core.generation.plan import make_plan
from opt_core.generation.strategies import ConstrainedBeamSearch

MODEL = OPTConfig(vocab_size=12, hidden_size=8, num_attention_heads=2, max_position_embeddings=40)
tokens = st.integers(0, 4)
words = st.lists(tokens, min_size=1, max_size=3)


class Whole(Constraint):
    """A constraint of a caller: the token 7; tests spoil a method of it."""

    seqlen = 1

    def __init__(self) -> None:
        self.left = 1

    def advance(self) -> Any:
        return 7

    def does_advance(self, token_id: int) -> bool:
        return token_id == 7

    def update(self, token_id: int) -> tuple[bool, bool, bool]:
        self.left -= token_id == 7
        return token_id == 7, not self.left, False

    def reset(self) -> None:
        self.left = 1

    def remaining(self) -> int:
        return self.left

    def copy(self, stateful: bool = False) -> Whole:
        return type(self)()


def make(word: list[Any]) -> Constraint:
    nested = isinstance(word[0], list)
    return DisjunctiveConstraint(word) if nested else PhrasalConstraint(word)


def progress(constraints: list[Any], row: list[int] = []) -> Progress:  # noqa: B006
    return Progress.start([make(word) for word in constraints], row)


# --- the classes ------------------------------------------------------------------------------


def test_a_phrase() -> None:
    phrase = PhrasalConstraint([3, 4])
    assert (phrase.advance(), phrase.remaining(), phrase.seqlen) == (3, 2, 2)
    assert phrase.update(3) == (True, False, False)
    assert phrase.does_advance(4) and not phrase.does_advance(3)
    same, fresh = phrase.copy(stateful=True), phrase.copy()
    assert (same.advance(), fresh.advance()) == (4, 3)
    assert phrase.update(9) == (False, False, True)
    assert phrase.advance() == 3
    assert same.update(4) == (True, True, False)
    assert same.completed and same.advance() is None and same.remaining() == 0


def test_alternatives() -> None:
    either = DisjunctiveConstraint([[3, 4, 5], [3, 6], [7]])
    assert (either.advance(), either.seqlen) == ([3, 7], 3)
    assert either.update(3) == (True, False, False)
    assert (either.advance(), either.remaining()) == ([4, 6], 2)
    assert either.update(6) == (True, True, False)
    assert either.completed and either.remaining() == 0 and not either.advance()
    either.reset()
    assert not either.completed and either.update(5) == (False, False, True)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ([], "expected a list of token ids, not empty"),
        ("7", "expected a list of token ids"),
        ([7, -1], "expected a list of token ids"),
        ([7, 1.5], "expected a list of token ids"),
    ],
)
def test_words_that_are_none(word: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"token_ids: {message}"):
        PhrasalConstraint(word)
    with pytest.raises(InputError, match=rf"nested_token_ids\[1\]: {message}"):
        DisjunctiveConstraint([[3], word])


@pytest.mark.parametrize("nested", [[], None, 3])
def test_alternatives_that_are_none(nested: Any) -> None:
    with pytest.raises(InputError, match="expected a list of words"):
        DisjunctiveConstraint(nested)


@pytest.mark.parametrize("nested", [[[3, 4], [5], [3]], [[3], [3]], [[3, 4, 5], [2], [3, 4]]])
def test_a_word_that_another_begins_with(nested: list[list[int]]) -> None:
    with pytest.raises(InputError, match=r"begins with \[3.*Leave out one of them"):
        DisjunctiveConstraint(nested)


# --- how far a row has come -------------------------------------------------------------------


def test_one_constraint_after_the_other() -> None:
    row = progress([[3, 4], [5]])
    assert (row.bank, row.fewest, row.proposals()) == (0, 3, [(3, 1), (5, 2)])
    begun = row.after(3)
    assert (begun.bank, begun.fewest, begun.proposals()) == (1, 2, [(4, 2)])
    assert begun.after(4).bank == 2 and begun.after(4).after(5).is_complete
    broken = begun.after(5)  # 5 breaks the word off, and counts for nothing else
    assert (broken.bank, broken.proposals()) == (0, [(5, 2), (3, 1)])


def test_the_first_constraint_that_can_takes_a_token() -> None:
    row = progress([[3, 4], [3, 5]])
    assert row.proposals() == [(3, 1), (3, 1)]
    assert not row.after(3).after(5).is_complete
    assert row.after(3).after(4).after(3).after(5).is_complete


def test_at_a_fork_only_the_first_alternative_counts_as_a_step() -> None:
    """The reference's copies share their tokens; a row that has really taken the second is right."""
    row = progress([[[3, 4], [3, 5]], [6]], [3])
    assert row.proposals() == [(4, 2), (5, 0)]
    assert row.after(5).bank == 2


@given(st.lists(words, min_size=1, max_size=3), st.lists(tokens, max_size=12))
def test_a_complete_row_holds_every_word(phrases: list[list[int]], row: list[int]) -> None:
    found = progress(phrases, row)
    starts = range(len(row))
    held = [any(row[i : i + len(word)] == word for i in starts) for word in phrases]
    assert not found.is_complete or all(held)
    assert len(row) >= sum(map(len, phrases)) - found.fewest
    if len(phrases) == len(phrases[0]) == 1:
        assert found.is_complete == held[0]


@given(st.lists(words, min_size=1, max_size=3), st.lists(tokens, max_size=8))
def test_proposals_lead_on(phrases: list[list[int]], row: list[int]) -> None:
    found = progress(phrases, row)
    assert bool(found.proposals()) is not found.is_complete
    for token, bank in found.proposals():
        assert bank == found.after(token).bank > found.bank
    for _ in range(found.fewest):
        found = found.after(found.proposals()[0][0])
    assert found.is_complete


# --- what a caller gives ----------------------------------------------------------------------


def test_given_constraints_stand_before_words() -> None:
    own = Whole()
    found = read_constraints([own], ((3, 4), ((5,), (6,))), 12)
    assert found[0] is own
    assert [type(c) for c in found[1:]] == [PhrasalConstraint, DisjunctiveConstraint]
    options = GenerationConfig(num_beams=2, force_words_ids=[[3]], pad_token_id=1)
    plan = make_plan(options, MODEL, 5, Hooks(constraints=[own]))
    assert isinstance(plan.strategy, ConstrainedBeamSearch)
    assert [c.seqlen for c in plan.strategy.constraints] == [1, 1] and plan.needs_host


def test_what_is_no_constraint() -> None:
    with pytest.raises(InputError, match=r"constraints\[1\]: expected .*opt_core.Constraint"):
        read_constraints([PhrasalConstraint([3]), [3]], None, 12)


def test_tokens_outside_the_vocabulary() -> None:
    with pytest.raises(InputError, match="PhrasalConstraint: token 12 lies outside .* 12 tokens"):
        read_constraints([PhrasalConstraint([3, 12])], None, 12)
    with pytest.raises(InputError, match="DisjunctiveConstraint: token 13"):
        read_constraints([DisjunctiveConstraint([[3], [4, 13]])], None, 12)
    with pytest.raises(InputError, match="Whole: token 7"):
        read_constraints([Whole()], None, 7)


@pytest.mark.parametrize(
    ("name", "result", "message"),
    [
        ("advance", None, "reported no completion after 0 tokens"),
        ("advance", [], "reported no completion after 0 tokens"),
        ("does_advance", False, r"does_advance\(7\) denies"),
        ("update", (False, False, True), r"update\(7\) denies"),
        ("update", (True, False, False), "reported no completion after 10000 tokens"),
    ],
)
def test_constraints_that_contradict_themselves(name: str, result: Any, message: str) -> None:
    broken = type("Broken", (Whole,), {name: lambda *arguments: result})
    with pytest.raises(InputError, match=f"Broken: .*{message}"):
        read_constraints([broken()], None, 12)


# --- which beams go on ------------------------------------------------------------------------


def beams(constraints: list[Any], rows: int = 2, limit: int = 4, **options: Any) -> Any:
    """Beams after the prompt [0], without end of sequence unless the options name one."""
    config = GenerationConfig(
        num_beams=rows, max_new_tokens=limit, force_words_ids=constraints, pad_token_id=1, **options
    )
    plan = make_plan(config, MODEL, 1)
    return ConstrainedBeams(plan, np.zeros((rows, 1), int), np.ones((rows, 1), int), limit)


def scores(found: ConstrainedBeams, **likely: float) -> Any:
    """The scores [B, V] of rows that find these tokens likely, say t5=-1.0, and all others not."""
    row = np.full(MODEL.vocab_size, -20.0, np.float32)
    for name, score in likely.items():
        row[int(name[1:])] = score
    return row + found.scores[:, None]


def test_each_bank_sends_its_best_row() -> None:
    """As in the reference, a row that fulfils all is lost where none of its tokens is likely."""
    found = beams([[3, 4]])
    chosen = []
    for _ in range(3):
        rows, next_tokens = found.choose(scores(found, t5=-1.0, t6=-2.0))
        chosen.append((rows.tolist(), next_tokens.tolist()))
    assert chosen == [([0, 0], [3, 5]), ([0, 1], [4, 3]), ([1, 1], [4, 5])]


def test_an_end_counts_only_where_the_constraints_are_fulfilled() -> None:
    found = beams([[3]], eos_token_id=2, early_stopping=True)
    found.choose(scores(found, t2=-0.1, t3=-1.0, t5=-2.0))
    assert not found.hypotheses[0].kept
    found.choose(scores(found, t2=-0.1, t3=-1.0, t5=-2.0))
    assert [h.tokens.tolist() for h in found.hypotheses[0].kept] == [[3]]


def test_an_end_counts_among_the_best_candidates_alone() -> None:
    """As many as rows; the prompt fulfils the constraint."""
    found = beams([[0]], eos_token_id=2)
    found.choose(scores(found, t5=-1.0, t6=-2.0, t2=-3.0))
    assert not found.hypotheses[0].kept
    found.choose(scores(found, t5=-1.0, t2=-1.5))
    assert [h.rows.tolist() for h in found.hypotheses[0].kept] == [[0, 0]]


def test_a_prompt_is_done_when_no_row_can_become_better() -> None:
    found = beams([[0]], eos_token_id=2)
    found.choose(scores(found, t2=-0.5, t5=-0.6, t6=-0.7))
    found.choose(scores(found, t5=-0.1, t2=-0.2))
    assert [h.score for h in found.hypotheses[0].kept] == pytest.approx([-0.5, -0.4])
    assert not found.finished.any()  # -0.7 / 2 is better than -0.5
    found.choose(scores(found, t5=-5.0))
    assert found.finished.all()


def test_an_end_follows_each_sequence() -> None:
    """The first of the ends, whichever was chosen; and nothing is wider than the longest."""
    found = beams([[0]], eos_token_id=[2, 4], early_stopping=True)
    for _ in range(2):
        found.choose(scores(found, t4=-0.1, t5=-0.2))
    assert found.finished.all()
    result = found.found()
    assert result.tokens.tolist() == [[2]] and result.beam_indices.tolist() == [[0]]


def test_rows_that_fulfil_nothing_compete_where_too_few_do() -> None:
    """As in the reference; with two sequences wanted and one that fulfils, the likelier is first."""
    sequences = {}
    for wanted in (1, 2):
        found = beams([[3]], limit=1, num_return_sequences=wanted)
        found.choose(scores(found, t5=-1.0))
        sequences[wanted] = found.found().tokens.tolist()
    assert sequences == {1: [[3]], 2: [[5], [3]]}


def test_pads_of_the_prompt_are_no_tokens() -> None:
    plan = beams([[1, 3]]).plan
    prompts = np.array([[5, 1], [5, 1]])
    with pytest.raises(InputError, match="at least 2 new tokens after prompt 0"):
        ConstrainedBeams(plan, prompts, np.array([[1, 0]] * 2), 1)
    assert ConstrainedBeams(plan, prompts, np.ones((2, 2), int), 1).progress[0].bank == 1


def test_constraints_that_need_more_tokens_than_allowed() -> None:
    with pytest.raises(InputError, match="at least 5 new tokens .* allow 4"):
        beams([[3, 4], [[5, 6, 7, 8], [9, 8]], [6]])
    beams([[3, 4], [[5, 6, 7, 8], [9, 8]]])


def test_the_best_sequences() -> None:
    kept = Hypotheses(ConstrainedBeamSearch(rows=2, length_penalty=1.0), limit=9)
    kept.add(-4.0, 2, np.array([3]), np.array([0]))
    kept.close(-1.0, 2)
    assert not kept.is_done
    kept.add(-9.0, 3, np.array([4]), np.array([0]))
    kept.add(-6.0, 3, np.array([5]), np.array([0]))
    kept.add(-30.0, 3, np.array([6]), np.array([0]))
    assert [(h.score, h.tokens.tolist()) for h in kept.best(2)] == [(-2.0, [5]), (-2.0, [3])]
    kept.close(-5.9, 3)
    assert not kept.is_done
    kept.close(-6.1, 3)
    assert kept.is_done


@pytest.mark.parametrize(("penalty", "is_done"), [(1.0, False), (0.0, True), (-1.0, True)])
def test_never_stopping_early_looks_at_the_longest_sequence(penalty: float, is_done: bool) -> None:
    strategy = ConstrainedBeamSearch(rows=1, length_penalty=penalty, early_stopping="never")
    kept = Hypotheses(strategy, limit=100)
    kept.add(-4.0, 2, np.array([3]), np.array([0]))
    kept.close(-6.0, 2)
    assert kept.is_done is is_done
