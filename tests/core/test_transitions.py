# SPDX-License-Identifier: Apache-2.0
"""The scores of generated tokens, looked up."""

from __future__ import annotations

import numpy as np
import pytest

from opt_core import InputError
from opt_core.generation.transitions import transition_scores

RNG = np.random.default_rng(0)
SCORES = [RNG.normal(size=(4, 7)).astype(np.float32) for _ in range(3)]


def test_without_beams_each_row_has_its_own_scores() -> None:
    sequences = np.array([[9, 9, 1, 2, 3], [9, 9, 4, 5, 6], [9, 9, 0, 0, 0], [9, 9, 6, 1, 2]])
    found = transition_scores(sequences, SCORES)
    assert found.dtype == np.float32
    for row in range(4):
        for step in range(3):
            assert found[row, step] == SCORES[step][row, sequences[row, 2 + step]]


def test_beams_look_into_the_rows_that_they_came_from() -> None:
    sequences = np.array([[9, 1, 2, 3], [9, 4, 2, 0]])
    rows = np.array([[0, 2, 1], [3, 3, -1]])
    found = transition_scores(sequences, SCORES, rows)
    assert found.tolist()[0] == [SCORES[0][0, 1], SCORES[1][2, 2], SCORES[2][1, 3]]
    assert found.tolist()[1] == [SCORES[0][3, 4], SCORES[1][3, 2], 0.0]


def test_beams_that_all_ended_early_need_fewer_columns() -> None:
    """The reference cuts to the longest, and so do the sequences."""
    rows = np.array([[0, 1, -1], [3, -1, -1]])
    found = transition_scores(np.array([[9, 1, 2], [9, 4, 1]]), SCORES, rows)
    assert found.tolist() == [[SCORES[0][0, 1], SCORES[1][1, 2]], [SCORES[0][3, 4], 0.0]]


def test_normalized_scores_are_log_probabilities() -> None:
    sequences = np.array([[5, 5, 5]] * 4)
    found = transition_scores(sequences, SCORES, normalize_logits=True)
    exact = [np.log(np.exp(s[:, 5]) / np.exp(s).sum(-1)) for s in SCORES]
    np.testing.assert_allclose(found, np.stack(exact, 1), atol=1e-6)


def test_scores_that_are_missing() -> None:
    with pytest.raises(InputError, match="output_scores=True"):
        transition_scores(np.zeros((1, 4), int), [])
    with pytest.raises(InputError, match="expected those of 3 steps, found 2"):
        transition_scores(np.zeros((1, 4), int), SCORES[:2], np.zeros((1, 3), int))
