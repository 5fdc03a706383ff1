# SPDX-License-Identifier: Apache-2.0
"""Sampling: the tokens of given noise by the float64 specification, and the frequencies of drawn ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from opt_core import GenerationConfig
from opt_core.generation.plan import make_plan
from tests.backends.base import Array, Backend
from tests.cases import case
from tests.reference.beams import beam_search
from tests.reference.model import forward, softmax
from tests.reference.processors import Row, log_softmax, process

MODELS = ("post_norm", "untied_gelu")
PAD, BATCH, LENGTH, STEPS, COPIES = 1, 3, 7, 5, 2
SAMPLINGS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"top_k": None, "temperature": 1.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_k": 0, "top_p": 0.6},
    "min_p": {"top_k": 0, "min_p": 0.2},
    "typical_p": {"top_k": 0, "typical_p": 0.5},
    "cutoffs": {"top_k": 0, "epsilon_cutoff": 0.02, "eta_cutoff": 0.03},
    "all": {
        "temperature": 1.3,
        "top_k": 20,
        "top_p": 0.9,
        "typical_p": 0.9,
        "repetition_penalty": 1.4,
        "renormalize_logits": True,
    },
}
BEAM_SAMPLINGS: dict[str, dict[str, Any]] = {
    "plain": {"num_beams": 3, "top_k": 0, "temperature": 1.5, "num_return_sequences": 2},
    "ends": {
        "num_beams": 3,
        "top_k": 12,
        "top_p": 0.9,
        "num_return_sequences": 3,
        "length_penalty": 0.5,
        "eos_token_id": tuple(range(3, 30)),
    },
}


#: The settings that backends which compile run: every processor is in one of them.
COMPILED = ("plain", "min_p", "cutoffs", "all")


def models_for(backend: Backend, number: int) -> tuple[str, ...]:
    """Both by torch, which compiles nothing, else one after the other."""
    return MODELS if backend.name == "torch" else (MODELS[number % 2],)


def prompts(name: str) -> dict[str, Array]:
    """Three rows of one batch, padded on the left."""
    start = "generate/greedy/left/"
    return {key: case(name).arrays[start + key] for key in ("input_ids", "attention_mask")}


def gumbel(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).gumbel(size=shape).astype(np.float32)


class Specification:
    """One unpadded row and its options, by the float64 model and processors."""

    def __init__(self, name: str, ids: list[int], options: dict[str, Any]) -> None:
        self.golden, self.ids = case(name), ids
        config = GenerationConfig(max_new_tokens=STEPS, pad_token_id=PAD, do_sample=True, **options)
        self.plan = make_plan(config, self.golden.config, len(ids))

    def logits(self, new: tuple[int, ...]) -> Array:
        tokens = np.array([[*self.ids, *new]])
        return forward(self.golden.config, self.golden.weights, tokens)["logits"][0, -1]

    def processed(self, scores: Array, new: tuple[int, ...]) -> Array:
        """The scores [V] of the token after `new`."""
        tokens = [*self.ids, *new]
        row = Row(tokens, self.ids, len(tokens), len(new), STEPS)
        for processor in self.plan.processors:
            scores = process(processor, scores[None], [row])[0]
        return scores

    def sample(self, noise: Array) -> list[int]:
        """argmax(scores + noise), step by step."""
        new: tuple[int, ...] = ()
        for drawn in noise:
            new += (int(np.argmax(self.processed(self.logits(new), new) + drawn)),)
        return list(new)

    def sample_beams(self, noise: Array) -> list[tuple[int, ...]]:
        """The highest of scores + noise [steps, beams, V], two for each beam, step by step."""

        def log_probs(new: Any) -> Array:
            return self.processed(log_softmax(self.logits(tuple(new))), tuple(new))

        plan = replace(self.plan, processors=())
        beams, _ = beam_search(plan, log_probs, noise, STEPS)
        return [beam.tokens for beam in beams]


@pytest.mark.parametrize("setting", SAMPLINGS)
def test_given_noise_gives_these_tokens(backend: Backend, models: Any, setting: str) -> None:
    """Two samples of each of three left-padded rows equal those of each row alone."""
    if not backend.runs_all_programs and setting not in COMPILED:
        pytest.skip("a program more: make test-slow")
    options = {**SAMPLINGS[setting], "eos_token_id": None}
    for name in models_for(backend, list(SAMPLINGS).index(setting)):
        batch = prompts(name)
        noise = gumbel((STEPS, BATCH * COPIES, case(name).config.vocab_size))
        found = backend.generate(
            models(name),
            **batch,
            do_sample=True,
            num_return_sequences=COPIES,
            max_new_tokens=STEPS,
            noise=noise,
            **options,
        )
        assert found.shape == (BATCH * COPIES, LENGTH + STEPS)
        for row, (ids, mask) in enumerate(zip(*batch.values(), strict=True)):
            specification = Specification(name, ids[mask == 1].tolist(), options)
            for copy in range(row * COPIES, row * COPIES + COPIES):
                expected = specification.sample(noise[:, copy])
                assert found[copy, LENGTH:].tolist() == expected, f"{name}, row {row}"


@pytest.mark.parametrize("setting", BEAM_SAMPLINGS)
def test_given_noise_gives_these_beams(backend: Backend, models: Any, setting: str) -> None:
    options = {"eos_token_id": None, **BEAM_SAMPLINGS[setting]}
    beams, copies = options["num_beams"], options["num_return_sequences"]
    for name in models_for(backend, list(BEAM_SAMPLINGS).index(setting)):
        batch = prompts(name)
        noise = gumbel((STEPS, BATCH * beams, case(name).config.vocab_size), seed=1)
        found = backend.generate(
            models(name),
            **batch,
            do_sample=True,
            max_new_tokens=STEPS,
            pad_token_id=PAD,
            noise=noise,
            **options,
        )[:, LENGTH:]
        for row, (ids, mask) in enumerate(zip(*batch.values(), strict=True)):
            specification = Specification(name, ids[mask == 1].tolist(), options)
            expected = specification.sample_beams(noise[:, row * beams : (row + 1) * beams])
            for tokens, new in zip(found[row * copies : (row + 1) * copies], expected, strict=True):
                padded = [*new, *[PAD] * (found.shape[1] - len(new))]
                assert tokens.tolist() == padded, f"{name}, row {row}"


def test_a_seed_says_which_tokens(backend: Backend, models: Any) -> None:
    """In another call, too; and the samples of one prompt differ."""
    settings = {"do_sample": True, "max_new_tokens": 16, "temperature": 2.0, "eos_token_id": None}
    settings |= {"num_return_sequences": 4, "top_k": 0}

    def sample(seed: int) -> list[list[int]]:
        batch = {key: value[:1] for key, value in prompts("post_norm").items()}
        return backend.generate(models("post_norm"), **batch, seed=seed, **settings).tolist()

    first = sample(3)
    assert first == sample(3) != sample(4)
    assert len({tuple(row) for row in first}) == 4


# --- frequencies ----------------------------------------------------------------------------------

SAMPLES = 3000
DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "top_k, top_p and temperature": {"top_k": 20, "top_p": 0.8, "temperature": 1.5},
    "typical_p": {"top_k": 0, "typical_p": 0.7},
    "min_p": {"top_k": 0, "min_p": 0.1},
}

#: Those of backends that compile: `typical_p` and `min_p` draw no differently from what they leave.
DRAWN = ("plain", "top_k, top_p and temperature")


def chi_square_score(counts: Array, expected: Array) -> float:
    """How many standard deviations the chi-square statistic is above what chance gives.

    By the cube root of Wilson and Hilferty. Cells that expect fewer than five are taken together.
    """
    assert not counts[expected == 0].any(), "an impossible token was drawn"
    few = (expected < 5) & (expected > 0)
    counts = np.append(counts[expected >= 5], counts[few].sum())
    expected = np.append(expected[expected >= 5], expected[few].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    ratio = float((((counts - expected) ** 2) / expected).sum()) / freedom
    return float((ratio ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom)))


def test_the_score_of_frequencies() -> None:
    """It knows right from wrong: of a fair die, and of one that is a tenth off."""
    rng, fair = np.random.default_rng(0), np.full(6, 1 / 6)
    loaded = np.array([0.9, 1, 1, 1, 1, 1.1]) / 6
    assert abs(chi_square_score(rng.multinomial(SAMPLES, fair), SAMPLES * fair)) < 3
    assert chi_square_score(rng.multinomial(5 * SAMPLES, loaded), 5 * SAMPLES * fair) > 4


@pytest.mark.parametrize("setting", DISTRIBUTIONS)
def test_frequencies_are_the_probabilities(backend: Backend, models: Any, setting: str) -> None:
    """Of the next token, against the specification; neither too far from it nor too near."""
    if not backend.runs_all_programs and setting not in DRAWN:
        pytest.skip("a program more: make test-slow")
    options = {**DISTRIBUTIONS[setting], "eos_token_id": None}
    ids = [5, 6, 7]
    found = backend.generate(
        models("pre_norm"),
        np.array([ids]),
        do_sample=True,
        num_return_sequences=SAMPLES,
        max_new_tokens=1,
        seed=1,
        **options,
    )[:, -1]
    specification = Specification("pre_norm", ids, options)
    expected = SAMPLES * softmax(specification.processed(specification.logits(()), ()))
    counts = np.bincount(found, minlength=len(expected))
    assert abs(chi_square_score(counts, expected)) < 4


def test_steps_are_drawn_independently(backend: Backend, models: Any) -> None:
    """The frequencies of pairs of tokens."""
    options = {"top_k": 6, "eos_token_id": None}
    ids = [5, 6, 7]
    found = backend.generate(
        models("pre_norm"),
        np.array([ids]),
        do_sample=True,
        num_return_sequences=SAMPLES,
        max_new_tokens=2,
        seed=2,
        **options,
    )[:, -2:]
    specification = Specification("pre_norm", ids, options)
    first = softmax(specification.processed(specification.logits(()), ()))  # [V]
    expected = np.zeros((len(first), len(first)))
    for token in np.flatnonzero(first).tolist():
        scores = specification.processed(specification.logits((token,)), (token,))
        expected[token] = SAMPLES * first[token] * softmax(scores)
    counts = np.zeros_like(expected)
    np.add.at(counts, (found[:, 0], found[:, 1]), 1)
    assert abs(chi_square_score(counts.ravel(), expected.ravel())) < 4
