# SPDX-License-Identifier: Apache-2.0
"""DoLa against its definition in numpy, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opt_core import InputError
from opt_core.generation.dola import early_layers
from tests.backends.base import Array, Backend
from tests.cases import case
from tests.reference.model import forward, greedy, softmax

PAD, STEPS = 1, 6


def contrasted(name: str, tokens: list[int], layers: tuple[int, ...]) -> Array:
    """The scores [V] of the next token of one row, in float64."""
    golden = case(name)
    trace = forward(golden.config, golden.weights, np.array([tokens]))
    embedding = golden.weights["model.decoder.embed_tokens.weight"]
    head = embedding if golden.config.tie_word_embeddings else golden.weights["lm_head.weight"]
    project = golden.weights.get("model.decoder.project_out.weight")
    late, found = softmax(trace["logits"][0, -1]), []
    for layer in layers:
        hidden = trace[f"hidden_states/{layer}"][0, -1]
        early = softmax((hidden if project is None else project @ hidden) @ head.T)
        mean = (late + early) / 2
        divergence = mean @ (np.log(mean) - np.log(late)) + mean @ (np.log(mean) - np.log(early))
        found.append((divergence, np.log(late) - np.log(early)))
    _, scores = max(found, key=lambda pair: pair[0])
    return np.where(late < 0.1 * late.max(), -np.inf, scores)


def rows(name: str) -> list[list[int]]:
    generator, vocabulary = np.random.default_rng(0), case(name).config.vocab_size
    return [generator.integers(3, vocabulary, count).tolist() for count in (7, 4)]


# The middle one projects its hidden states before the head, which the last one has not tied.
@pytest.mark.parametrize(
    ("name", "layers"), [("pre_norm", (0, 1)), ("post_norm", (1,)), ("untied_gelu", "low")]
)
def test_contrasts_layers(backend: Backend, models: Any, name: str, layers: Any) -> None:
    numbers = early_layers(layers, case(name).config)
    expected = []
    for row in rows(name):
        tokens = list(row)
        for _ in range(STEPS):
            tokens.append(int(np.argmax(contrasted(name, tokens, numbers))))
        expected.append(tokens[len(row) :])
    ids, mask = np.full((2, 7), PAD), np.ones((2, 7), int)
    mask[1, :3] = 0
    ids[mask == 1] = np.concatenate(rows(name))
    settings = {"max_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": PAD}
    arguments = {"input_ids": ids, "attention_mask": mask, **settings, "dola_layers": layers}
    found = backend.generate(models(name), **arguments)
    assert found[:, 7:].tolist() == expected
    assert expected[0] != greedy(case(name).config, case(name).weights, rows(name)[0], STEPS)


def test_scores(backend: Backend, models: Any) -> None:
    row = rows("pre_norm")[0]
    settings = {"max_new_tokens": 1, "eos_token_id": None, "pad_token_id": PAD}
    output = backend.generate_output(
        models("pre_norm"), np.array([row]), **settings, dola_layers=[0, 1], output_scores=True
    )
    expected, found = contrasted("pre_norm", row, (0, 1)), output["scores"][0][0]
    assert np.array_equal(np.isinf(found), np.isinf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "tied", "low", "high"),
    [
        (1, True, (0,), (0,)),
        (2, True, (1,), (1,)),
        (2, False, (0,), (1,)),
        (4, True, (2,), (2,)),
        (12, True, (2, 4), (6, 8, 10)),
        (12, False, (0, 2, 4), (6, 8, 10)),
        (48, True, tuple(range(2, 20, 2)), tuple(range(28, 48, 2))),
    ],
)
def test_halves(layers: int, tied: bool, low: tuple[int, ...], high: tuple[int, ...]) -> None:
    config = case("pre_norm").config.replace(num_hidden_layers=layers, tie_word_embeddings=tied)
    assert (early_layers("low", config), early_layers("high", config)) == (low, high)


def test_layers_that_are_none(backend: Backend, models: Any) -> None:
    last = case("pre_norm").config.num_hidden_layers
    settings = {"max_new_tokens": 2, "eos_token_id": None}
    with pytest.raises(InputError, match=f"{last} is no early layer"):
        backend.generate(models("pre_norm"), np.array([[5]]), **settings, dola_layers=[0, last])
    with pytest.raises(InputError, match="both change the logits"):
        backend.generate(
            models("pre_norm"), np.array([[5]]), **settings, dola_layers=[0], guidance_scale=2.0
        )
    with pytest.raises(InputError, match="too few"):
        early_layers("low", case("pre_norm").config.replace(num_hidden_layers=3))
