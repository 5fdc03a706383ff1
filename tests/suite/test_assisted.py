# SPDX-License-Identifier: Apache-2.0
"""Assisted decoding and prompt lookup: exactly the tokens of `Search`, in fewer calls of the model."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from opt_core import InputError
from tests.backends.base import Array, Backend
from tests.cases import case
from tests.reference.model import greedy

NAME, OTHER = "pre_norm", "no_final_norm"  # of the same vocabulary
PAD, LENGTH, STEPS = 1, 7, 16
PLAIN: dict[str, Any] = {"max_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": PAD}
LOOKUP = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3}
PENALTIES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
VOCABULARY = case(NAME).config.vocab_size
#: Makes a loop run step by step, which saves the time to compile it.
WATCHED: dict[str, Any] = {"stopping_criteria": [lambda tokens, scores: False]}


def batch(side: str) -> dict[str, Array]:
    """Three prompts, two of them padded."""
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (3, LENGTH))
    mask = np.ones_like(ids)
    for row, pads in enumerate((3, 0, 2)):
        mask[row, slice(pads) if side == "left" else slice(LENGTH - pads, None)] = 0
    return {"input_ids": np.where(mask == 1, ids, PAD), "attention_mask": mask}


def one_prompt() -> Array:
    return batch("left")["input_ids"][1:2]


def gumbel(rows: int = 3) -> Array:
    noise = np.random.default_rng(1).gumbel(size=(STEPS, rows, VOCABULARY))
    return noise.astype(np.float32)


def proposers(models: Any) -> Iterator[dict[str, Any]]:
    """A perfect assistant, a bad one, and none."""
    yield {"assistant_model": models(NAME)}
    yield {"assistant_model": models(OTHER), "num_assistant_tokens": 3}
    yield LOOKUP


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "processors": PENALTIES,
    "noise": {"do_sample": True, "noise": gumbel(), "temperature": 0.7, "top_k": 20},
    "seed": {"do_sample": True, "seed": 3},
    "guidance": {"guidance_scale": 1.6},
}
COMPILES = ("seed", "guidance")  # programs of their own: fewer cases of them


@pytest.mark.parametrize(
    ("side", "setting"), [*(("left", setting) for setting in SETTINGS), ("right", "greedy")]
)
def test_the_tokens_of_search(backend: Backend, models: Any, side: str, setting: str) -> None:
    """Endless rows, and rows of which one ends in the middle.

    A seed stands for the same noise in a loop that is compiled as a whole.
    """
    arguments = {**batch(side), **PLAIN, **SETTINGS[setting]}
    watched = {} if setting == "seed" else WATCHED
    endless = backend.generate(models(NAME), **arguments, **watched)
    ends = (None,) if setting in COMPILES else (None, int(endless[1, LENGTH + 6]))
    for eos in ends:
        arguments["eos_token_id"] = eos
        expected = backend.generate(models(NAME), **arguments, **watched).tolist()
        for proposer in list(proposers(models))[:: 2 if setting in COMPILES else 1]:
            assert backend.generate(models(NAME), **arguments, **proposer).tolist() == expected


def test_schedules_change_no_tokens(backend: Backend, models: Any) -> None:
    expected = backend.generate(models(NAME), **batch("left"), **PLAIN).tolist()
    for options in (
        {"num_assistant_tokens": 1, "num_assistant_tokens_schedule": "constant"},
        {"num_assistant_tokens": 40},
    ):
        settings = {**PLAIN, **options, "assistant_model": models(NAME)}
        assert backend.generate(models(NAME), **batch("left"), **settings).tolist() == expected


# --- fewer calls ----------------------------------------------------------------------------------


@pytest.fixture
def widths(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The columns of each call of a model after the prompts, as they come."""
    module = importlib.import_module(f"{backend.package.__name__}.generation.decode")
    run_model, found = module.run_model, []

    def counted(*arguments: Any, **others: Any) -> Any:
        *_, last, tokens = arguments
        if not last:
            found.append(tokens.shape[1])
        return run_model(*arguments, **others)

    monkeypatch.setattr(module, "run_model", counted)
    return found


def test_a_perfect_assistant(backend: Backend, models: Any, widths: list[int]) -> None:
    """The first token comes with the prompt; then 4 proposals and one more at a time: 3 calls for 15."""
    backend.generate(
        models(NAME),
        one_prompt(),
        **PLAIN,
        assistant_model=models(NAME),
        num_assistant_tokens=4,
        num_assistant_tokens_schedule="constant",
    )
    assert sum(width > 2 for width in widths) == 3
    # The assistant reads its own last proposal and the model's token in one call, then one at a time.
    assert [width for width in widths if width <= 2] == [1, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1]


def test_more_is_proposed_as_long_as_it_is_right(
    backend: Backend, models: Any, widths: list[int]
) -> None:
    """3 and one more, 5 and one more, then the 4 of 7 that are still asked for."""
    settings = {**PLAIN, "num_assistant_tokens": 3, "max_new_tokens": 1 + 4 + 6 + 5}
    backend.generate(models(NAME), one_prompt(), **settings, assistant_model=models(NAME))
    assert sum(width > 2 for width in widths) == 3
    assert sum(width <= 2 for width in widths) == 3 + 5 + 4


def test_lookup_finds_what_repeats(backend: Backend, models: Any, widths: list[int]) -> None:
    """With noise that makes every fourth token the same, all that follows the first eight is known."""
    noise = np.zeros((STEPS, 1, VOCABULARY), np.float32)
    noise[np.arange(STEPS), 0, 50 + np.arange(STEPS) % 4] = 1000
    settings = {**PLAIN, **LOOKUP, "do_sample": True, "top_k": 0, "noise": noise}
    found = backend.generate(models(NAME), one_prompt(), **settings)
    assert found[0, LENGTH:].tolist() == [50, 51, 52, 53] * 4
    assert len(widths) == 4 + 3  # 4 tokens that nothing has announced, 10 in fives, the last one


# --- what is seen of it ---------------------------------------------------------------------------


class Listener:
    def __init__(self) -> None:
        self.heard: list[list[int]] = []

    def put(self, value: Array) -> None:
        self.heard.append(np.ravel(value).tolist())

    def end(self) -> None:
        self.heard.append([])


def test_shows_what_search_shows(backend: Backend, models: Any) -> None:
    """One prompt: scores, logits, layers and cache as if each token had come from a call of its own."""
    asked = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    model, ids = models(NAME, attn_implementation="eager"), one_prompt()
    settings = {**PLAIN, **PENALTIES, **dict.fromkeys(asked, True), "max_new_tokens": 7}
    seen = [Listener(), Listener()]
    expected = backend.generate_output(model, ids, **settings, streamer=seen[0])
    settings |= {"assistant_model": models(OTHER), "streamer": seen[1]}
    found = backend.generate_output(model, ids, **settings)
    assert seen[0].heard == seen[1].heard
    assert len(seen[0].heard) == 1 + 7 + 1
    assert found["sequences"].tolist() == expected["sequences"].tolist()
    for name in ("scores", "logits"):
        near(found[name], expected[name])
    for name in ("attentions", "hidden_states", "past_key_values"):
        for call, other in zip(found[name], expected[name], strict=True):
            for array, twin in zip(call, other, strict=True):
                near(array, twin)


def near(found: Any, expected: Any) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.array_equal(np.isinf(found), np.isinf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=0, atol=1e-5)


def test_criteria_end_a_row(backend: Backend, models: Any) -> None:
    """They see every token, and none of the proposals."""
    seen: list[list[int]] = []

    def ends(tokens: Any, scores: Any) -> bool:
        seen.append(np.asarray(tokens)[0, LENGTH:].tolist())
        return len(seen[-1]) == 6

    settings = {**PLAIN, "assistant_model": models(NAME), "stopping_criteria": [ends]}
    found = backend.generate(models(NAME), one_prompt(), **settings)
    tokens = found[0, LENGTH:].tolist()
    assert seen == [tokens[: n + 1] for n in range(6)]
    assert tokens == backend.generate(models(NAME), one_prompt(), **PLAIN)[0, LENGTH:][:6].tolist()


@pytest.mark.parametrize("what", ["streamer", "output_scores"])
def test_several_prompts_cannot_be_followed(backend: Backend, models: Any, what: str) -> None:
    settings = {**PLAIN, **LOOKUP, "return_dict_in_generate": what != "streamer"}
    value = Listener() if what == "streamer" else True
    with pytest.raises(InputError, match=f"{what}.*3 prompts"):
        backend.generate(models(NAME), **batch("left"), **settings, **{what: value})


# --- prompts and limits ---------------------------------------------------------------------------


def test_fills_the_position_table_to_the_brim(backend: Backend, models: Any) -> None:
    """What proposals are filled up with lies beyond the table, and is never looked at."""
    settings = {"max_length": 41, "eos_token_id": None, "pad_token_id": PAD}
    golden, ids = case(NAME), np.tile(one_prompt(), 4)  # 28 tokens
    expected = greedy(golden.config, golden.weights, ids[0].tolist(), 41 - ids.shape[1])
    found = backend.generate(models(NAME), ids, **settings, assistant_model=models(NAME))
    assert found[0, ids.shape[1] :].tolist() == expected


def test_lookup_after_a_cache_and_among_embeddings(backend: Backend, models: Any) -> None:
    ids, model = one_prompt(), models(NAME)
    expected = backend.generate(model, ids, **PLAIN)
    past = backend.forward(model, input_ids=ids[:, :-2], use_cache=True)["raw"].past_key_values
    found = backend.generate(model, ids, **PLAIN, **LOOKUP, past_key_values=past)
    assert found.tolist() == expected.tolist()
    embeds = case(NAME).weights["model.decoder.embed_tokens.weight"][ids]
    found = backend.generate(model, inputs_embeds=embeds, **PLAIN, **LOOKUP)
    assert found.tolist() == expected[:, LENGTH:].tolist()


def test_assistants_that_cannot_help(backend: Backend, models: Any) -> None:
    model, ids = models(NAME), one_prompt()
    short = backend.create(case(NAME).config.replace(max_position_embeddings=21))
    refused = {
        "vocabulary of 103 tokens, found 99": models("post_norm"),
        "22 positions": short,
        "expected a model of the class": backend.load(case(NAME).folder, architecture="OPTModel"),
    }
    for message, assistant in refused.items():
        with pytest.raises(InputError, match=message):
            backend.generate(model, ids, **PLAIN, assistant_model=assistant)
    with pytest.raises(InputError, match=r"inputs_embeds or\s+past_key_values"):
        backend.generate(
            model,
            inputs_embeds=np.zeros((1, 2, case(NAME).config.word_embed_proj_dim), np.float32),
            **PLAIN,
            assistant_model=model,
        )
    with pytest.raises(InputError, match="assisted and for prompt-lookup"):
        backend.generate(model, ids, **PLAIN, **LOOKUP, assistant_model=model)
    settings = {**PLAIN, "do_sample": True, "num_return_sequences": 2}
    with pytest.raises(InputError, match="num_return_sequences=2"):
        backend.generate(model, ids, **settings, assistant_model=model)
