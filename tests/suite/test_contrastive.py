# SPDX-License-Identifier: Apache-2.0
"""Contrastive search: its definition in numpy, what it shows of its steps, and its limits.

The reference's tokens stand in test_strategies.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opt_core import InputError
from tests.backends.base import Array, Backend
from tests.cases import case
from tests.reference.model import forward, softmax

NAME, PAD = "pre_norm", 1
OPTIONS = {"penalty_alpha": 0.6, "top_k": 4, "eos_token_id": None, "pad_token_id": PAD}
MEMORY = pytest.mark.parametrize("low_memory", [False, True], ids=["side_by_side", "low_memory"])


def prompt(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(3, case(NAME).config.vocab_size, shape)


def log_softmax(logits: Array) -> Array:
    return np.log(softmax(logits))


def run(tokens: list[int]) -> tuple[Array, Array]:
    """The logits [V] of the last token, and the hidden states [T, E] of all."""
    golden = case(NAME)
    found = forward(golden.config, golden.weights, np.array([tokens]))
    return found["logits"][0, -1], found["last_hidden_state"][0]


def simulate(prompt: list[int], steps: int, guidance: float) -> list[int]:
    """Contrastive search of one row by the float64 specification, guided away from no prompt."""
    tokens = list(prompt)
    for _ in range(steps):
        logits, context = run(tokens)
        without, _ = run(tokens[len(prompt) - 1 :])
        guided = log_softmax(without)
        scores = guided + guidance * (log_softmax(logits) - guided)
        candidates = np.argsort(-scores)[: OPTIONS["top_k"]]
        ranks = []
        for candidate in candidates:
            _, hidden = run([*tokens, int(candidate)])
            lengths = np.linalg.norm(context, axis=-1) * np.linalg.norm(hidden[-1])
            likeness = (context @ hidden[-1] / lengths).max()
            alpha = OPTIONS["penalty_alpha"]
            ranks.append((1 - alpha) * softmax(scores)[candidate] - alpha * likeness)
        tokens.append(int(candidates[np.argmax(ranks)]))
    return tokens[len(prompt) :]


@MEMORY
def test_guided_rows_of_a_padded_batch(backend: Backend, models: Any, low_memory: bool) -> None:
    """Each candidate has a guide, which follows the candidate that is taken."""
    first, second = prompt(1, 7)[0], prompt(1, 4, seed=1)[0]
    ids, mask = np.full((2, 7), PAD), np.ones((2, 7), int)
    ids[0], ids[1, 3:], mask[1, :3] = first, second, 0
    settings = {**OPTIONS, "guidance_scale": 1.7, "low_memory": low_memory, "max_new_tokens": 6}
    found = backend.generate(models(NAME), ids, attention_mask=mask, **settings)
    expected = [simulate(row.tolist(), 6, guidance=1.7) for row in (first, second)]
    assert found[:, 7:].tolist() == expected


@MEMORY
def test_shows_the_calls_for_the_tokens_that_were_taken(
    backend: Backend, models: Any, low_memory: bool
) -> None:
    """Nothing is shown of the other candidates, nor of those for the token after the last one."""
    model, ids = models(NAME, attn_implementation="eager"), prompt(2, 5)
    settings = {**OPTIONS, "low_memory": low_memory, "max_new_tokens": 4}
    asked = ("output_attentions", "output_hidden_states", "output_logits")
    found = backend.generate_output(model, ids, **settings, **dict.fromkeys(asked, True))
    fed = found["sequences"][:, :-1]
    whole = backend.forward(
        model, input_ids=fed, output_attentions=True, output_hidden_states=True, use_cache=True
    )
    assert fed.shape == (2, 8)
    for name in ("attentions", "hidden_states", "logits"):
        assert len(found[name]) == 4
    for step, column in enumerate(range(4, 8)):
        columns = slice(0, 5) if step == 0 else slice(column, column + 1)
        near(found["logits"][step], whole["logits"][:, column])
        for layer, hidden_states in enumerate(whole["hidden_states"]):
            near(found["hidden_states"][step][layer], hidden_states[:, columns])
        for layer, attentions in enumerate(whole["attentions"]):
            near(found["attentions"][step][layer], attentions[:, :, columns, : column + 1])
    for pair, expected in zip(found["past_key_values"], whole["past_key_values"], strict=True):
        for array, other in zip(pair, expected, strict=True):
            near(array, other)


def near(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_fills_the_position_table_to_the_brim(backend: Backend, models: Any) -> None:
    """The candidates for the last token take a position too: 40 of them are enough for 40 tokens."""
    model, ids = models(NAME), prompt(1, 7)
    settings = {**OPTIONS, "max_length": 40}
    found = backend.generate(model, ids, **settings)
    assert found.shape == (1, 40)
    assert found.tolist() == backend.generate(model, ids, **settings, low_memory=True).tolist()
    with pytest.raises(InputError, match="41 positions"):
        backend.generate(model, ids, **{**settings, "max_length": 41})


def test_no_more_candidates_than_tokens(backend: Backend, models: Any) -> None:
    with pytest.raises(InputError, match=r"top_k=104.*vocabulary of 103"):
        backend.generate(models(NAME), prompt(1, 3), **{**OPTIONS, "top_k": 104})
