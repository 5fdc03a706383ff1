# SPDX-License-Identifier: Apache-2.0
"""The logits processors alone, against the reference's and against their definitions in numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_core import InputError
from opt_core.generation import processors as p
from tests.backends.base import Array, Backend
from tests.cases import GOLDEN
from tests.reference.processors import DEFINITIONS, Row, process

with np.load(GOLDEN / "processors.npz") as _file:
    VALUES = dict(_file)

KEYS = tuple(key.removesuffix("/settings") for key in VALUES if key.endswith("/settings"))
PROMPT_LENGTH, LENGTH, VOCABULARY = 7, 9, 31


def allowed(prompt: int, tokens: Any) -> list[int]:
    """The function that the golden file was recorded with."""
    return [(prompt + int(tokens[-1]) + i) % VOCABULARY for i in range(3)]


def eos(s: dict[str, Any]) -> tuple[int, ...]:
    found = s["eos_token_id"]
    return tuple(found) if isinstance(found, list) else (found,)


def keep(s: dict[str, Any]) -> int:
    return s.get("min_tokens_to_keep", 1)


def biases(s: dict[str, Any]) -> p.SequenceBias:
    return p.SequenceBias(tuple((tuple(ids), bias) for ids, bias in s["sequence_bias"]))


def bad_words(s: dict[str, Any]) -> p.SequenceBias:
    words = [tuple(word) for word in s["bad_words_ids"] if word != [s["eos_token_id"]]]
    return p.SequenceBias(tuple((word, -np.inf) for word in words))


#: By the reference's arguments.
BUILDERS: dict[str, Callable[[dict[str, Any]], p.LogitsProcessor]] = {
    "guidance": lambda s: p.Guidance(s["guidance_scale"]),
    "sequence_bias": biases,
    "bad_words": bad_words,
    "diversity": lambda s: p.Diversity(s["diversity_penalty"]),
    "prompt_repetition_penalty": lambda s: p.PromptRepetitionPenalty(s["penalty"]),
    "repetition_penalty": lambda s: p.RepetitionPenalty(s["penalty"]),
    "no_repeat_ngram": lambda s: p.NoRepeatNGram(s["ngram_size"]),
    "min_length": lambda s: p.MinLength(s["min_length"], eos(s)),
    "min_new_tokens": lambda s: p.MinNewTokens(s["min_new_tokens"], eos(s)),
    "prefix_allowed": lambda s: p.PrefixAllowed(allowed, s["num_beams"]),
    "forced_bos": lambda s: p.ForcedBOS(s["bos_token_id"]),
    "forced_eos": lambda s: p.ForcedEOS(eos(s)),
    "remove_invalid": lambda s: p.RemoveInvalid(),
    "length_decay": lambda s: p.LengthDecay(*s["exponential_decay_length_penalty"], eos(s)),
    "suppress": lambda s: p.Suppress(tuple(s["suppress_tokens"])),
    "suppress_at_begin": lambda s: p.SuppressAtBegin(
        tuple(s["begin_suppress_tokens"]), s["begin_index"] - PROMPT_LENGTH
    ),
    "force_tokens": lambda s: p.ForceTokens(tuple((i, t) for i, t in s["force_token_map"])),
    "temperature": lambda s: p.Temperature(s["temperature"]),
    # The plan limits k to the vocabulary.
    "top_k": lambda s: p.TopK(min(max(s["top_k"], keep(s)), VOCABULARY)),
    "top_p": lambda s: p.TopP(s["top_p"], keep(s)),
    "typical": lambda s: p.Typical(s["mass"], keep(s)),
    "epsilon": lambda s: p.Epsilon(s["epsilon"], keep(s)),
    "eta": lambda s: p.Eta(s["epsilon"], keep(s)),
    "renormalize": lambda s: p.Renormalize(),
}


def arguments(key: str) -> dict[str, Any]:
    return json.loads(str(VALUES[f"{key}/settings"]))


def run(backend: Backend, processors: list[p.LogitsProcessor], scores: Array, **more: Any) -> Array:
    """Scores after the processors; the tokens stand in a longer buffer, as in a decoding loop."""
    ids = VALUES["input_ids"]
    tokens = np.concatenate([ids, np.full((len(ids), 3), 30)], axis=1)
    mask = np.ones_like(tokens)
    return backend.process(processors, scores, tokens, mask, LENGTH, PROMPT_LENGTH, **more)


def assert_same(found: Array, expected: Array, rtol: float = 1e-6, atol: float = 0.0) -> None:
    assert np.array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def test_a_backend_applies_every_processor(backend: Backend) -> None:
    assert backend.applied == set(p.PROCESSORS) == set(DEFINITIONS)


def test_the_reference_was_recorded_for_every_processor_that_it_has() -> None:
    known = {type(BUILDERS[key.split("/")[0]](arguments(key))) for key in KEYS}
    assert set(p.PROCESSORS) - known == {p.UserDefined, p.MinP}


@pytest.mark.parametrize("key", KEYS)
def test_equals_the_reference(backend: Backend, key: str) -> None:
    name, given = key.split("/")[0], arguments(key)
    more = {
        "guidance": {"unconditional": VALUES["unconditional"]},
        "diversity": {"chosen": VALUES["chosen"]},
        "forced_eos": {"limit": given.get("max_length", 0) - PROMPT_LENGTH},
    }.get(name, {})
    for start in ("", "tied_", "forbidden_", "invalid_"):
        if f"{key}/{start}result" in VALUES:
            found = run(backend, [BUILDERS[name](given)], VALUES[f"{start}scores"], **more)
            # Log-probabilities close to 0 are differences of large numbers.
            assert_same(found, VALUES[f"{key}/{start}result"], atol=1e-6)


def test_the_first_token_can_be_forced(backend: Backend) -> None:
    tokens = VALUES["input_ids"]
    found = backend.process(
        [p.ForcedBOS(6)], VALUES["scores"], tokens, np.ones_like(tokens), LENGTH, 9, offset=8
    )
    assert_same(found, VALUES["forced_bos/0/first_result"])


# --- against the definitions ----------------------------------------------------------------------

ROWS, COLUMNS, TOKENS, END = 4, 10, 9, 8  # few tokens, so that they repeat; pads are token 1
ids = st.integers(0, TOKENS - 1)
some_ids = st.lists(ids, min_size=1, max_size=3, unique=True).map(tuple)
keeps = st.integers(1, 4)
shares = st.floats(0.01, 0.99)


def every_second(prompt: int, tokens: Any) -> list[int]:
    return [token for token in range(TOKENS) if (token + prompt + len(tokens)) % 2]


def halved(tokens: Any, scores: Any) -> Any:
    return scores / 2


sequences = st.lists(ids, min_size=1, max_size=4).map(tuple)
#: Settings of each processor.
SETTINGS: dict[type[p.LogitsProcessor], st.SearchStrategy[p.LogitsProcessor]] = {
    p.Guidance: st.builds(p.Guidance, st.floats(0.5, 5)),
    p.SequenceBias: st.dictionaries(sequences, st.floats(-9, 9), min_size=1, max_size=6).map(
        lambda found: p.SequenceBias(tuple(found.items()))
    ),
    p.Diversity: st.builds(p.Diversity, st.floats(0.1, 9)),
    p.PromptRepetitionPenalty: st.builds(p.PromptRepetitionPenalty, st.floats(0.3, 3)),
    p.RepetitionPenalty: st.builds(p.RepetitionPenalty, st.floats(0.3, 3)),
    p.NoRepeatNGram: st.builds(p.NoRepeatNGram, st.sampled_from([1, 2, 3, 11])),
    p.MinLength: st.builds(p.MinLength, st.integers(5, 10), some_ids),
    p.MinNewTokens: st.builds(p.MinNewTokens, st.integers(1, 5), some_ids),
    p.PrefixAllowed: st.builds(p.PrefixAllowed, st.just(every_second), st.sampled_from([1, 2])),
    p.ForcedBOS: st.builds(p.ForcedBOS, ids),
    p.ForcedEOS: st.builds(p.ForcedEOS, some_ids),
    p.RemoveInvalid: st.builds(p.RemoveInvalid),
    p.LengthDecay: st.builds(p.LengthDecay, st.integers(0, 3), st.floats(0.5, 2), some_ids),
    p.Suppress: st.builds(p.Suppress, some_ids),
    p.SuppressAtBegin: st.builds(p.SuppressAtBegin, some_ids, st.integers(0, 3)),
    p.ForceTokens: st.lists(st.tuples(st.integers(3, 8), ids), min_size=1, max_size=3).map(
        lambda found: p.ForceTokens(tuple(found))
    ),
    p.UserDefined: st.builds(p.UserDefined, st.just(halved)),
    p.Temperature: st.builds(p.Temperature, st.floats(0.1, 9)),
    p.TopK: st.builds(p.TopK, st.integers(1, TOKENS)),
    p.TopP: st.builds(p.TopP, shares, keeps),
    p.MinP: st.builds(p.MinP, shares, keeps),
    p.Typical: st.builds(p.Typical, shares, keeps),
    p.Epsilon: st.builds(p.Epsilon, shares, keeps),
    p.Eta: st.builds(p.Eta, shares, keeps),
    p.Renormalize: st.builds(p.Renormalize),
}


class Batch:
    """A padded batch, rows of which hold 1 to 5 tokens of a prompt, and 0 to 4 new ones."""

    def __init__(self, seed: int, new: int, limit: int) -> None:
        rng = np.random.default_rng(seed)
        self.length, self.prompt_length, self.offset = 5 + new, 5, rng.integers(0, 3).item()
        self.limit = limit
        self.tokens = rng.integers(0, TOKENS, (ROWS, COLUMNS))
        pads = rng.integers(self.offset, 5, (ROWS, 1))
        self.mask = (np.arange(COLUMNS) >= pads).astype(np.int64)
        self.tokens[self.mask == 0] = 1
        self.scores = (2 * rng.standard_normal((ROWS, TOKENS))).astype(np.float32)
        self.scores[rng.random(self.scores.shape) < 0.1] = -np.inf
        self.scores[:, 3] = 0.25  # something is always possible
        self.unconditional = rng.standard_normal((ROWS, TOKENS)).astype(np.float32)
        self.chosen = rng.integers(0, TOKENS, (2, 3))  # of two prompts with two rows each

    def rows(self) -> list[Row]:
        return [
            Row(
                self.tokens[i, self.first(i) : self.length].tolist(),
                self.tokens[i, self.first(i) : self.prompt_length].tolist(),
                self.length - self.offset,
                self.length - self.prompt_length,
                self.limit,
                self.unconditional[i],
                tuple(self.chosen[i // 2].tolist()),
                i,
            )
            for i in range(ROWS)
        ]

    def first(self, row: int) -> int:
        return int(COLUMNS - self.mask[row].sum())

    def processed(
        self, backend: Backend, processors: list[p.LogitsProcessor], compiled: bool = False
    ) -> Array:
        return backend.process(
            processors,
            self.scores,
            self.tokens,
            self.mask,
            self.length,
            self.prompt_length,
            offset=self.offset,
            limit=self.limit,
            unconditional=self.unconditional,
            chosen=self.chosen,
            compiled=compiled,
        )


batches = st.builds(Batch, st.integers(0, 2**31), st.integers(0, 4), st.integers(1, 5))


@pytest.mark.parametrize("kind", p.PROCESSORS)
def test_equals_its_definition(backend: Backend, kind: type[p.LogitsProcessor]) -> None:
    """Also that pads do not matter, of which the definitions know nothing."""

    @settings(max_examples=12, derandomize=True, database=None)
    @given(SETTINGS[kind], batches)
    def check(processor: p.LogitsProcessor, batch: Batch) -> None:
        expected = process(processor, batch.scores, batch.rows())
        assert_same(batch.processed(backend, [processor]), expected, rtol=2e-6, atol=2e-6)

    check()


def test_compiled_with_lengths_that_are_told_at_run_time(backend: Backend) -> None:
    """All processors that no host runs, in one program."""
    processors = [
        p.Guidance(1.5),
        p.SequenceBias((((3,), 1.5), ((4, 5), -2.0), ((1, 2, 3), -np.inf))),
        p.Diversity(0.5),
        p.PromptRepetitionPenalty(1.2),
        p.RepetitionPenalty(1.3),
        p.NoRepeatNGram(3),
        p.MinLength(4, (END,)),
        p.MinNewTokens(2, (END,)),
        p.ForcedBOS(4),
        p.ForcedEOS((6,)),
        p.RemoveInvalid(),
        p.LengthDecay(1, 1.1, (END,)),
        p.Suppress((0,)),
        p.SuppressAtBegin((2,), 2),
        p.ForceTokens(((2, 5),)),
        p.Temperature(0.9),
        p.TopK(8),
        p.TopP(0.99),
        p.MinP(0.01),
        p.Typical(0.98),
        p.Epsilon(0.001),
        p.Eta(0.001),
        p.Renormalize(),
    ]
    assert [type(one) for one in processors] == [
        kind for kind in p.PROCESSORS if not issubclass(kind, p.HostProcessor)
    ]
    batch = Batch(5, 3, 5)
    expected = batch.processed(backend, processors)
    assert len(np.unique(np.isfinite(expected))) == 2  # some stay, some go
    assert_same(batch.processed(backend, processors, compiled=True), expected, 1e-5, 1e-5)


# --- by hand --------------------------------------------------------------------------------------


def test_pads_are_not_repeated_tokens(backend: Backend) -> None:
    """The reference penalises the pad token of a padded row; a row alone has no such token."""
    scores = np.ones((1, 4), np.float32)
    tokens, mask = np.array([[1, 1, 3]]), np.array([[0, 0, 1]])
    found = backend.process([p.RepetitionPenalty(2.0)], scores, tokens, mask, 3, 3)
    assert found.tolist() == [[1.0, 1.0, 1.0, 0.5]]


def test_one_token_always_stays(backend: Backend) -> None:
    scores = np.array([[0.0, 4.0, 1.0]], np.float32)
    tokens = np.array([[0]])
    for processor in (p.TopP(0.0), p.TopK(1), p.MinP(1.0), p.Epsilon(0.99), p.Eta(0.99)):
        found = backend.process([processor], scores, tokens, np.ones_like(tokens), 1, 1)
        assert np.isfinite(found).tolist() == [[False, True, False]]


def test_in_the_given_order(backend: Backend) -> None:
    """With a high temperature first, top_p keeps more."""
    hot, nucleus = p.Temperature(5.0), p.TopP(0.5)
    first = run(backend, [hot, nucleus], VALUES["scores"])
    last = run(backend, [nucleus, hot], VALUES["scores"])
    assert np.isfinite(first).sum() > np.isfinite(last).sum()


@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("kind", [p.TopP, p.Typical])
def test_a_large_vocabulary(backend: Backend, kind: Any, spread: float) -> None:
    """Whether the likeliest thousand have the probability (a spread of 3) or have not."""
    rng = np.random.default_rng(3)
    scores = (spread * rng.standard_normal((2, 2500))).astype(np.float32)
    tokens, rows = np.zeros((2, 1), np.int64), [Row([0], [0], 1, 0, 1, index=i) for i in range(2)]
    found = backend.process([kind(0.8)], scores, tokens, np.ones_like(tokens), 1, 1)
    assert_same(found, process(kind(0.8), scores, rows).astype(np.float32))
    assert (np.isfinite(found).sum(axis=1) > 1024).all() == (spread == 0.1)


def test_a_forbidden_end_stays_forbidden(backend: Backend) -> None:
    """In the reference, its score becomes NaN, and then it is chosen."""
    scores = np.array([[-np.inf, 1.0]], np.float32)
    tokens = np.zeros((1, 3), np.int64)
    found = backend.process(
        [p.LengthDecay(0, 2.0, (0, 1))], scores, tokens, np.ones_like(tokens), 2, 1
    )
    assert found.tolist() == [[-np.inf, 2.0]]


def test_no_group_has_chosen_yet(backend: Backend) -> None:
    assert_same(run(backend, [p.Diversity(1.0)], VALUES["scores"]), VALUES["scores"])


@pytest.mark.parametrize("found", [[], [VOCABULARY], [-1]])
def test_a_prefix_must_allow_a_token(backend: Backend, found: list[int]) -> None:
    with pytest.raises(InputError, match="prefix_allowed_tokens_fn.*for prompt 0 after 9 tokens"):
        run(backend, [p.PrefixAllowed(lambda prompt, tokens: found, 2)], VALUES["scores"])


@pytest.mark.parametrize("function", [lambda tokens, scores: None, lambda tokens, scores: tokens])
def test_a_function_must_return_scores(backend: Backend, function: Any) -> None:
    with pytest.raises(InputError, match=r"logits_processor: expected scores \(4, 31\)"):
        run(backend, [p.UserDefined(function)], VALUES["scores"])


def test_a_function_sees_the_columns_that_count(backend: Backend) -> None:
    seen = []

    def function(tokens: Any, scores: Any) -> Any:
        seen.append((type(tokens), type(scores), np.asarray(tokens).tolist()))
        return scores

    run(backend, [p.UserDefined(function)], VALUES["scores"], offset=2)
    ((token_type, score_type, tokens),) = seen
    assert token_type is score_type is not np.ndarray
    assert tokens == VALUES["input_ids"][:, 2:LENGTH].tolist()
