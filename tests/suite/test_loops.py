# SPDX-License-Identifier: Apache-2.0
"""The loop of greedy decoding and sampling with a step that is no model: what it feeds, where it stops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opt_core.generation import processors as p
from opt_core.generation.plan import DecodePlan
from opt_core.generation.strategies import Search
from tests.backends.base import Array, Backend

VOCABULARY, PAD = 16, 1
UPWARDS = 5.0 * np.eye(VOCABULARY, k=1, dtype=np.float32)  # after each token the next higher one


def plan(count: int, eos: tuple[int, ...] = (), *, do_sample: bool = False, **options: Any) -> Any:
    return DecodePlan(
        strategy=Search(do_sample=do_sample),
        processors=options.pop("processors", ()),
        prompt_length=1,
        max_new_tokens=count,
        eos_token_ids=eos,
        pad_token_id=PAD,
        **options,
    )


def run(backend: Backend, first: list[int], *args: Any, **options: Any) -> tuple[Any, int, int]:
    """Decodes rows of which each would begin with the token in `first`."""
    call = {key: options.pop(key) for key in ("limit", "noise", "watch") if key in options}
    tokens = np.array(first)[:, None] - 1
    found, count, steps = backend.decode(plan(*args, **options), tokens, UPWARDS, **call)
    return found[:, :count].tolist(), count, steps


class Recorder:
    """Watches a loop, and ends rows when told to."""

    def __init__(self, *verdicts: Any) -> None:
        self.verdicts = list(verdicts)
        self.tokens: list[Array] = []
        self.scores: list[Array] = []
        self.tokens_seen = 0

    def chose(self, tokens: Any, scores: Any, logits: Any) -> Array:
        self.tokens.append(np.asarray(tokens).copy())
        self.scores.append(np.asarray(scores).copy())
        assert np.asarray(logits).shape == np.asarray(scores).shape
        self.tokens_seen += 1
        verdict = self.verdicts.pop(0) if self.verdicts else False
        return np.broadcast_to(np.array(verdict), len(tokens)).copy()


watches = pytest.mark.parametrize("watch", [None, Recorder], ids=["compiled", "watched"])


@watches
def test_counts_upwards(backend: Backend, watch: Any) -> None:
    found = run(backend, [3, 7], 4, watch=watch and watch())
    assert found == ([[3, 4, 5, 6], [7, 8, 9, 10]], 4, 3)


@pytest.mark.parametrize("count", [1, 5])
def test_steps_are_as_many_as_the_plans_capacity_allows(backend: Backend, count: int) -> None:
    """The last token is never fed back: with a capacity of prompt + new - 1 no column is missing."""
    assert run(backend, [3], count)[1:] == (count, count - 1)
    assert plan(count).capacity == count


@watches
def test_a_limit_below_the_room_of_the_buffer(backend: Backend, watch: Any) -> None:
    found = run(backend, [3, 7], 8, limit=2, watch=watch and watch())
    assert found == ([[3, 4], [7, 8]], 2, 1)


@watches
def test_ended_rows_continue_with_pads_and_the_last_one_ends_the_loop(
    backend: Backend, watch: Any
) -> None:
    found = run(backend, [3, 6], 6, (7,), watch=watch and watch())
    assert found == ([[3, 4, 5, 6, 7], [6, 7, PAD, PAD, PAD]], 5, 4)
    assert run(backend, [7, 7], 6, (7,), watch=watch and watch()) == ([[7], [7]], 1, 0)


def test_what_is_not_filled_are_pads(backend: Backend) -> None:
    tokens, count, _ = backend.decode(plan(6, (7,)), np.array([[6]]), UPWARDS)
    assert (tokens.tolist(), count) == ([[7, *[PAD] * 5]], 1)


def test_any_of_several_ends(backend: Backend) -> None:
    found, count, _ = run(backend, [3, 9], 4, (4, 10))
    assert (found, count) == ([[3, 4], [9, 10]], 2)


@watches
def test_processors_change_the_scores(backend: Backend, watch: Any) -> None:
    processors = (p.MinNewTokens(3, (5,)), p.Temperature(0.5))
    found, _, _ = run(backend, [4], 4, (5,), processors=processors, watch=watch and watch())
    assert found == [[4, 0, 1, 2]]  # with 5 forbidden all are the same, and the first is taken


def test_noise_decides_where_it_is_larger(backend: Backend) -> None:
    noise = np.zeros((3, 1, VOCABULARY), np.float32)
    noise[1, 0, 12] = 9.0
    assert run(backend, [3], 3, do_sample=True, noise=noise)[0] == [[3, 12, 13]]


def test_who_watches_sees_each_step_in_order(backend: Backend) -> None:
    """The rows with their prompts, and the scores that the processors made."""
    watch = Recorder()
    halved = (p.Temperature(2.0),)
    run(backend, [3, 7], 3, processors=halved, do_sample=True, noise=_none(3, 2), watch=watch)
    expected = [[[2, 3], [6, 7]], [[2, 3, 4], [6, 7, 8]], [[2, 3, 4, 5], [6, 7, 8, 9]]]
    assert [tokens.tolist() for tokens in watch.tokens] == expected
    for tokens, scores in zip(watch.tokens, watch.scores, strict=True):
        np.testing.assert_array_equal(scores, UPWARDS[tokens[:, -2]] / 2)


def test_who_watches_ends_one_row_or_all(backend: Backend) -> None:
    one = Recorder(False, [True, False])
    assert run(backend, [3, 7], 4, watch=one)[:2] == ([[3, 4, PAD, PAD], [7, 8, 9, 10]], 4)
    everything = Recorder(False, True)
    assert run(backend, [3, 7], 4, watch=everything) == ([[3, 4], [7, 8]], 2, 1)
    at_once = Recorder(True)
    assert run(backend, [3, 7], 4, watch=at_once) == ([[3], [7]], 1, 0)


def test_a_row_that_was_ended_stays_ended(backend: Backend) -> None:
    """A criterion need not repeat itself."""
    watch = Recorder([True, False], [False, False], [False, True])
    found = run(backend, [3, 7], 5, watch=watch)
    assert found == ([[3, PAD, PAD], [7, 8, 9]], 3, 2)


def _none(steps: int, rows: int) -> Array:
    return np.zeros((steps, rows, VOCABULARY), np.float32)
