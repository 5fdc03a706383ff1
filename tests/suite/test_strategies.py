# SPDX-License-Identifier: Apache-2.0
"""Strategies and options against the reference's tokens, row by row and whatever stands beside a row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

from opt_core import InputError
from tests.backends.base import Array, Backend
from tests.cases import GOLDEN, Case, case
from tests.reference.model import forward
from tests.reference.processors import log_softmax

MODELS = ("pre_norm", "post_norm")
PAD = 1


@dataclass(frozen=True)
class Recorded:
    """What the reference does with one setting, each row by itself."""

    model: str
    prompts: list[Array]  # each [1, T]
    negatives: list[Array]
    rows: list[dict[str, Array]]  # new [R, any], scores [steps, R, V], ...
    options: dict[str, Any]

    @property
    def beams(self) -> int:
        return int(self.options.get("num_beams", 1))

    def expected(self) -> list[list[int]]:
        """The new tokens of all rows, filled with pads as a batch is."""
        new = [sequence.tolist() for row in self.rows for sequence in row["new"]]
        width = max(map(len, new))
        return [sequence + [PAD] * (width - len(sequence)) for sequence in new]

    def batch(self, side: str) -> dict[str, Array]:
        """The prompts as one batch padded on the left or on the right."""
        width = max(prompt.shape[1] for prompt in self.prompts)
        ids, mask = np.full((2, len(self.prompts), width), PAD)
        mask[:] = 0
        for row, (prompt,) in enumerate(self.prompts):
            place = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
            ids[row, place], mask[row, place] = prompt, 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.negatives:
            batch["negative_prompt_ids"] = np.concatenate(self.negatives)
        return batch

    def alone(self, row: int) -> dict[str, Array]:
        """A prompt by itself."""
        found = {"input_ids": self.prompts[row]}
        return {**found, "negative_prompt_ids": self.negatives[row]} if self.negatives else found


@cache
def arrays(model: str) -> dict[str, Array]:
    with np.load(GOLDEN / "decoding" / f"{model}.npz") as file:
        return dict(file)


def same_parity(batch_id: int, tokens: Any) -> list[int]:
    """The tokens that are even where the last one is, and odd where it is odd."""
    return list(range(int(tokens[-1]) % 2, 99, 2))


@cache
def recorded(model: str, setting: str) -> Recorded:
    parts = {
        key.removeprefix(f"{setting}/"): value
        for key, value in arrays(model).items()
        if key.startswith(f"{setting}/")
    }
    facts = json.loads(str(parts.pop("facts")))
    options = facts["options"]
    if facts["prefix"]:
        options["prefix_allowed_tokens_fn"] = same_parity
    rows: list[dict[str, Array]] = [{} for _ in range(facts["rows"])]
    for key, value in parts.items():
        name, row = key.split("/")
        rows[int(row)][name] = value
    negatives = [row.pop("negative") for row in rows if "negative" in row]
    return Recorded(model, [row.pop("prompt") for row in rows], negatives, rows, options)


SETTINGS = tuple(key.removesuffix("/facts") for key in arrays(MODELS[0]) if key.endswith("/facts"))
#: Columns of a batch count its padding, as they do in the reference.
BY_COLUMN = "greedy/forced_decoder_ids"
#: Compiling is what takes time: the settings that backends which compile run, each on one model. The
#: processors are alike whatever the strategy, and are tested by themselves, all of them in one program.
COMPILED = (
    "greedy/plain",
    "greedy/encoder_repetition_penalty",
    "greedy/forced_eos",
    "greedy/decay",
    "greedy/several",
    "greedy/prefix",
    "greedy/guidance",
    "greedy/negative",
    "beam/several_eos",
    "beam/four",
    "beam/early",
    "beam/never",
    "beam/several",
    "group/eos",
    "group/several",
    "contrastive/eos",
    "contrastive/low_memory",
    "contrastive/several",
)


def models_for(
    backend: Backend, setting: str, compiled: tuple[str, ...] = COMPILED
) -> tuple[str, ...]:
    """Both where that compiles nothing, or all is run; else one for each of `compiled`."""
    if backend.runs_all_programs:
        return MODELS
    if setting not in compiled:
        pytest.skip("a program more: make test-slow")
    return (MODELS[compiled.index(setting) % 2],)


def new_tokens(backend: Backend, model: Any, columns: int, **arguments: Any) -> list[list[int]]:
    return backend.generate(model, **arguments)[:, columns:].tolist()


@pytest.mark.parametrize("setting", [key for key in SETTINGS if key != BY_COLUMN])
def test_rows_in_batches_are_the_references_rows_alone(
    backend: Backend, models: Any, setting: str
) -> None:
    for name in models_for(backend, setting):
        golden = recorded(name, setting)
        for side in ("left", "right"):
            batch = golden.batch(side)
            columns = batch["input_ids"].shape[1]
            found = new_tokens(backend, models(name), columns, **batch, **golden.options)
            assert found == golden.expected(), f"{name}, padded on the {side}"


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_row_alone(backend: Backend, models: Any, setting: str) -> None:
    for name in models_for(backend, setting, (BY_COLUMN, "beam/eos")):
        golden = recorded(name, setting)
        for row, expected in enumerate(golden.rows):
            arguments = golden.alone(row)
            columns = arguments["input_ids"].shape[1]
            found = new_tokens(backend, models(name), columns, **arguments, **golden.options)
            assert found == expected["new"].tolist(), f"{name}, row {row}"


SCORED = ("greedy/plain", "greedy/guidance", "beam/plain", "group/plain", "contrastive/plain")
WITH_BEAMS = tuple(key for key in SETTINGS if key.startswith(("beam/", "group/")))


@pytest.mark.parametrize("setting", dict.fromkeys((*SCORED, *WITH_BEAMS)))
def test_scores_and_beam_indices(backend: Backend, models: Any, setting: str) -> None:
    for name in models_for(
        backend, setting, ("greedy/guidance", "beam/short", "contrastive/plain")
    ):
        golden = recorded(name, setting)
        batch = golden.batch("left")
        output = backend.generate_output(
            models(name), **batch, **golden.options, output_scores=True
        )
        new = output["sequences"][:, batch["input_ids"].shape[1] :]
        assert new.tolist() == golden.expected()
        _check_beams(output, new, golden)
        rows = golden.beams
        for row, expected in enumerate(golden.rows):
            for step, scores in enumerate(expected.get("scores", ())):
                found = output["scores"][step][row * rows : (row + 1) * rows]
                assert np.array_equal(np.isinf(found), np.isinf(scores))
                finite = np.isfinite(scores)
                np.testing.assert_allclose(found[finite], scores[finite], rtol=0, atol=1e-4)


def _check_beams(output: dict[str, Any], new: Array, golden: Recorded) -> None:
    """Scores of whole sequences, and which row of the batch each token came from."""
    if golden.beams == 1:
        assert output.keys().isdisjoint({"sequences_scores", "beam_indices"})
        return
    means = np.concatenate([row["sequences_scores"] for row in golden.rows])
    np.testing.assert_allclose(output["sequences_scores"], means, rtol=0, atol=1e-4)
    if len(golden.options["eos_token_id"] or ()) < 2:  # of several, the first is written for each
        _check_path(output, new, golden.options.get("length_penalty", 1.0))
    if "num_beam_groups" not in golden.options:  # with which the reference mixes up the rows
        assert output["beam_indices"].tolist() == _indices(golden, output["beam_indices"].shape)


def _check_path(output: dict[str, Any], new: Array, length_penalty: float) -> None:
    """The scores along the rows that a sequence came from, and of its tokens, sum up to its own."""
    for sequence, rows in enumerate(output["beam_indices"]):
        steps = np.flatnonzero(rows >= 0)
        path = [output["scores"][step][rows[step], new[sequence, step]] for step in steps]
        mean = sum(path) / len(path) ** length_penalty
        assert abs(output["sequences_scores"][sequence] - mean) < 1e-4


def _indices(golden: Recorded, shape: tuple[int, ...]) -> list[list[int]]:
    """The reference's rows, which are those of one prompt, as rows of the batch."""
    expected = []
    for row, alone in enumerate(golden.rows):
        for indices in alone["beam_indices"].tolist():
            moved = [i + row * golden.beams if i >= 0 else -1 for i in indices[: shape[1]]]
            expected.append(moved + [-1] * (shape[1] - len(moved)))
    return expected


# --- other ways to give a prompt ------------------------------------------------------------------

CONTINUED = ("greedy/plain", "beam/eos", "group/eos", "contrastive/plain")


@pytest.mark.parametrize("setting", CONTINUED)
def test_embeddings_instead_of_ids(backend: Backend, models: Any, setting: str) -> None:
    """The new tokens alone come back, as there are none of the prompts."""
    for name in models_for(backend, setting, ("group/eos", "contrastive/plain")):
        golden = recorded(name, setting)
        table = case(name).weights["model.decoder.embed_tokens.weight"]
        for side in ("left", "right"):
            batch = golden.batch(side)
            batch["inputs_embeds"] = table[batch.pop("input_ids")]
            found = backend.generate(models(name), **batch, **golden.options)
            assert found.tolist() == golden.expected(), f"{name}, padded on the {side}"


@pytest.mark.parametrize("setting", CONTINUED[:3])
def test_continuing_a_cache(backend: Backend, models: Any, setting: str) -> None:
    """A cache of all but the last two columns gives the same tokens as none."""
    for name in models_for(backend, setting, ("greedy/plain", "beam/eos")):
        golden = recorded(name, setting)
        batch = golden.batch("left")
        first = {key: value[:, :-2] for key, value in batch.items()}
        past = backend.forward(models(name), **first, use_cache=True)["raw"].past_key_values
        columns = batch["input_ids"].shape[1]
        options = {**golden.options, "past_key_values": past}
        assert new_tokens(backend, models(name), columns, **batch, **options) == golden.expected()


def test_contrastive_search_takes_no_cache(backend: Backend, models: Any) -> None:
    golden = recorded(MODELS[0], "contrastive/plain")
    ids = golden.prompts[1]
    past = backend.forward(models(MODELS[0]), input_ids=ids[:, :-2], use_cache=True)[
        "raw"
    ].past_key_values
    with pytest.raises(InputError, match="hidden states"):
        backend.generate(models(MODELS[0]), ids, past_key_values=past, **golden.options)


@pytest.mark.parametrize("setting", ["greedy/forced_bos", "beam/forced_bos"])
def test_no_prompt_is_the_beginning_of_a_text(backend: Backend, models: Any, setting: str) -> None:
    name = MODELS[setting.startswith("beam")]
    golden = recorded(name, setting)
    found = backend.generate(models(name), None, **golden.options)
    assert found.tolist() == [[2, *row] for row in golden.expected()]


def logits(golden: Case, tokens: list[int]) -> Array:
    """[V] of the next token, by the float64 specification."""
    return forward(golden.config, golden.weights, np.array([tokens]))["logits"][0, -1]


def test_a_negative_prompt_may_be_longer_than_the_prompt(backend: Backend, models: Any) -> None:
    """arXiv:2306.17806, equation 8, step by step."""
    golden, scale = case(MODELS[0]), 1.5
    prompts, negatives = np.array([[PAD, 40], [52, 7]]), np.array([[21, 64, 9, 35, 77, 60, 18]] * 2)
    found = new_tokens(
        backend,
        models(MODELS[0]),
        2,
        input_ids=prompts,
        negative_prompt_ids=negatives,
        guidance_scale=scale,
        max_new_tokens=6,
        eos_token_id=None,
    )
    for row, prompt in enumerate(([40], [52, 7])):
        tokens: list[int] = []
        for _ in range(6):
            given, other = (
                log_softmax(logits(golden, [*start, *tokens])) for start in (prompt, negatives[row])
            )
            tokens.append(int((other + scale * (given - other)).argmax()))
        assert found[row] == tokens
