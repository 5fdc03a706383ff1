# SPDX-License-Identifier: Apache-2.0
"""The logits processors alone, against the reference's."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from opt_core.generation import processors as p
from tests.backends.base import Array, Backend
from tests.cases import GOLDEN

with np.load(GOLDEN / "processors.npz") as _file:
    VALUES = dict(_file)

#: min_tokens_to_keep is an argument of the reference's classes that generate never sets.
KEYS = tuple(
    key.removesuffix("/settings")
    for key, value in VALUES.items()
    if key.endswith("/settings") and "min_tokens_to_keep" not in json.loads(str(value))
)
PROMPT_LENGTH = 7


def eos(settings: dict[str, Any]) -> tuple[int, ...]:
    found = settings["eos_token_id"]
    return tuple(found) if isinstance(found, list) else (found,)


def build(key: str) -> p.LogitsProcessor:
    """Our processor of the same settings."""
    settings = json.loads(str(VALUES[f"{key}/settings"]))
    kind = key.split("/")[0]
    if kind == "temperature":
        return p.Temperature(settings["temperature"])
    if kind == "top_k":  # the plan limits k to the vocabulary
        return p.TopK(min(settings["top_k"], VALUES["scores"].shape[1]))
    if kind == "top_p":
        return p.TopP(settings["top_p"])
    if kind == "repetition_penalty":
        return p.RepetitionPenalty(settings["penalty"])
    if kind == "min_length":
        return p.MinLength(settings["min_length"], eos(settings))
    assert kind == "min_new_tokens" and settings["prompt_length_to_skip"] == PROMPT_LENGTH
    return p.MinNewTokens(settings["min_new_tokens"], eos(settings))


def run(backend: Backend, processors: list[p.LogitsProcessor], scores: Array) -> Array:
    """Scores after the processors; the tokens stand in a longer buffer, as in a decoding loop."""
    ids = VALUES["input_ids"]
    tokens = np.concatenate([ids, np.full((len(ids), 3), 30)], axis=1)
    mask = np.ones_like(tokens)
    return backend.process(processors, scores, tokens, mask, ids.shape[1], PROMPT_LENGTH)


def assert_same(found: Array, expected: Array) -> None:
    assert np.array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


def test_a_backend_applies_every_processor(backend: Backend) -> None:
    assert backend.applied == set(p.PROCESSORS)


def test_there_are_settings_for_every_processor() -> None:
    assert {type(build(key)) for key in KEYS} == set(p.PROCESSORS)


@pytest.mark.parametrize("key", KEYS)
def test_equals_the_reference(backend: Backend, key: str) -> None:
    assert_same(run(backend, [build(key)], VALUES["scores"]), VALUES[f"{key}/result"])


@pytest.mark.parametrize("key", [key for key in KEYS if key.startswith("top_k")])
def test_ties_at_the_lowest_kept_score(backend: Backend, key: str) -> None:
    assert_same(run(backend, [build(key)], VALUES["tied_scores"]), VALUES[f"{key}/tied_result"])


def test_pads_are_not_repeated_tokens(backend: Backend) -> None:
    """The reference penalises the pad token of a padded row; a row alone has no such token."""
    scores = np.ones((1, 4), np.float32)
    tokens, mask = np.array([[1, 1, 3]]), np.array([[0, 0, 1]])
    found = backend.process([p.RepetitionPenalty(2.0)], scores, tokens, mask, 3, 3)
    assert found.tolist() == [[1.0, 1.0, 1.0, 0.5]]


def test_one_token_always_stays(backend: Backend) -> None:
    scores = np.array([[0.0, 4.0, 1.0]], np.float32)
    tokens = np.array([[0]])
    for processor in (p.TopP(0.0), p.TopK(1)):
        found = backend.process([processor], scores, tokens, np.ones_like(tokens), 1, 1)
        assert np.isfinite(found).tolist() == [[False, True, False]]


def test_in_the_given_order(backend: Backend) -> None:
    """With a high temperature first, top_p keeps more."""
    hot, nucleus = p.Temperature(5.0), p.TopP(0.5)
    first = run(backend, [hot, nucleus], VALUES["scores"])
    last = run(backend, [nucleus, hot], VALUES["scores"])
    assert np.isfinite(first).sum() > np.isfinite(last).sum()
