# SPDX-License-Identifier: Apache-2.0
"""Constrained beam search: the reference's sequences, whatever stands beside a row."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from opt_core import Constraint, InputError, PhrasalConstraint
from tests.backends.base import Array, Backend
from tests.cases import GOLDEN

RECORD = json.loads((GOLDEN / "constrained.json").read_text())
PROMPTS, SETTINGS = RECORD["prompts"], RECORD["settings"]
PAD, BEAMS, NEW_TOKENS = 1, 4, 10
WIDTH = max(map(len, PROMPTS))


class InOrder(Constraint):
    """These tokens in this order, whatever stands between them: a caller's own constraint."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids, self.seqlen, self.count = token_ids, len(token_ids), 0

    def advance(self) -> int | None:
        return self.token_ids[self.count] if self.remaining() else None

    def does_advance(self, token_id: int) -> bool:
        return token_id == self.advance()

    def update(self, token_id: int) -> tuple[bool, bool, bool]:
        stepped = self.does_advance(token_id)
        self.count += stepped
        return stepped, not self.remaining(), False

    def reset(self) -> None:
        self.count = 0

    def remaining(self) -> int:
        return self.seqlen - self.count

    def copy(self, stateful: bool = False) -> InOrder:
        copied = InOrder(self.token_ids)
        copied.count = self.count if stateful else 0
        return copied


def options(name: str) -> dict[str, Any]:
    found = dict(SETTINGS[name]["options"])
    if "in_order" in found:
        found["constraints"] = [InOrder(found.pop("in_order"))]
    common = {"num_beams": BEAMS, "max_new_tokens": NEW_TOKENS, "pad_token_id": PAD}
    return {**common, "eos_token_id": None, **found}


def batch(side: str) -> dict[str, Array]:
    """All prompts, padded on one side."""
    ids = np.full((len(PROMPTS), WIDTH), PAD)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        row[slice(len(prompt)) if side == "right" else slice(WIDTH - len(prompt), None)] = prompt
    mask = np.array([[int(token != PAD) for token in row] for row in ids])
    return {"input_ids": ids, "attention_mask": mask}


def check(found: dict[str, Any], name: str, prompts: range, columns: int) -> None:
    """Holds new tokens, scores and beam indices of some prompts against the reference's."""
    rows = [SETTINGS[name]["rows"][i] for i in prompts]
    count = len(rows[0]["tokens"])
    new_tokens = found["sequences"][:, columns:]
    assert found["sequences"].shape[0] == len(rows) * count
    for i, row in enumerate(rows):
        for j, tokens in enumerate(row["tokens"]):
            place = i * count + j
            missing = new_tokens.shape[1] - len(tokens)
            assert new_tokens[place].tolist() == tokens + [PAD] * missing
            if "scores" in row:
                score = row["scores"][j]
                np.testing.assert_allclose(
                    found["sequences_scores"][place], score, rtol=2e-5, atol=1e-4
                )
            if "beam_indices" in row:
                indices = [k + i * BEAMS if k >= 0 else k for k in row["beam_indices"][j]]
                own = found["beam_indices"][place].tolist()
                assert own[: len(indices)] == indices and set(own[len(indices) :]) <= {-1}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_padded_batch(backend: Backend, models: Any, name: str) -> None:
    found = backend.generate_output(
        models(RECORD["case"]), **batch("left"), **options(name), output_scores=True
    )
    check(found, name, range(len(PROMPTS)), WIDTH)


@pytest.mark.parametrize("name", ["words", "end"])
def test_padding_on_the_right(backend: Backend, models: Any, name: str) -> None:
    """Pads in the middle of a row are no tokens that could break off a word of the prompt."""
    found = backend.generate_output(models(RECORD["case"]), **batch("right"), **options(name))
    check(found, name, range(len(PROMPTS)), WIDTH)


def test_a_row_alone(backend: Backend, models: Any) -> None:
    found = backend.generate_output(
        models(RECORD["case"]), np.array(PROMPTS[:1]), **options("in_prompt"), output_scores=True
    )
    check(found, "in_prompt", range(1), len(PROMPTS[0]))


def test_recorded_scores_include_those_of_the_rows(backend: Backend, models: Any) -> None:
    """As in the reference: sums of log-probabilities, before the rows are reordered."""
    found = backend.generate_output(
        models(RECORD["case"]), **batch("left"), **options("word"), output_scores=True
    )
    place, row = found["beam_indices"][0], found["sequences"][0, WIDTH:]
    last = found["scores"][-1][place[-1], row[-1]]
    np.testing.assert_allclose(last / NEW_TOKENS, found["sequences_scores"][0], rtol=1e-5)


def test_a_criterion_ends_a_prompt_by_itself(backend: Backend, models: Any) -> None:
    """The rows of the first prompt end after three tokens, and the others as without a criterion."""
    setting = options("word")

    def criterion(tokens: Any, scores: Any) -> Array:
        return (np.arange(len(tokens)) < BEAMS) & (tokens.shape[1] == WIDTH + 3)

    found = backend.generate_output(
        models(RECORD["case"]), **batch("left"), **setting, stopping_criteria=[criterion]
    )
    first, *others = found["sequences"][:, WIDTH:].tolist()
    assert first[3:] == [PAD] * (NEW_TOKENS - 3) and PAD not in first[:3]
    assert others == [row["tokens"][0] for row in SETTINGS["word"]["rows"][1:]]


def test_more_tokens_than_allowed(backend: Backend, models: Any) -> None:
    """A word that a prompt has, or ends with the beginning of, needs no tokens, or fewer."""
    limits = {"num_beams": 2, "max_new_tokens": 2, "pad_token_id": PAD, "eos_token_id": None}
    prompt = np.array([[20, 21, 5, 30]])
    words = {"force_words_ids": [[20, 21], [30, 31, 32]]}
    found = backend.generate(models(RECORD["case"]), prompt, **words, **limits)
    assert found[0].tolist() == [20, 21, 5, 30, 31, 32]
    constraints = [PhrasalConstraint([7])]
    with pytest.raises(InputError, match="at least 3 new tokens after prompt 0.* allow 2"):
        backend.generate(models(RECORD["case"]), prompt, constraints=constraints, **words, **limits)
