# SPDX-License-Identifier: Apache-2.0
"""What callers hand to `generate` by mistake, or in another form than the usual one."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from opt_core import ConfigError, InputError, OPTError, TextStreamer
from tests.backends.base import Backend

IDS = np.array([[5, 6, 7], [8, 9, 10]])
VOCABULARY = 103
SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 1, "eos_token_id": None}
PAST = [(np.zeros((1, 4, 2, 6), np.float32), np.zeros((1, 4, 2, 6), np.float32))] * 3

ERRORS: dict[str, tuple[dict[str, Any], type[OPTError], str]] = {
    "a dictionary": ({"generation_config": {}}, InputError, "found dict.*from_dict makes one"),
    "a ragged mask": ({"attention_mask": [[1, 1, 1], [1]]}, InputError, "rows that make no array"),
    "a mask of no guide": (
        {"negative_prompt_attention_mask": np.ones_like(IDS)},
        InputError,
        "needs a guidance_scale",
    ),
    "a mask of nothing": (
        {"guidance_scale": 2.0, "negative_prompt_attention_mask": np.ones_like(IDS)},
        InputError,
        "give both",
    ),
    "a cache of one row": (
        {"past_key_values": PAST},
        InputError,
        r"\(2, 4, columns, 6\).*found \(1, 4, 2, 6\)",
    ),
    "a flag for a seed": ({"do_sample": True, "seed": True}, InputError, "seed: expected a whole"),
    "no streamer": ({"streamer": object()}, InputError, r"put\(ids\) and end\(\)"),
    "two sequences in one text": (
        {"do_sample": True, "num_return_sequences": 2, "streamer": TextStreamer(None)},
        InputError,
        "prints one sequence",
    ),
    "a huge penalty of lengths": (
        {"num_beams": 2, "length_penalty": 1000.0},
        InputError,
        r"4 \*\* length_penalty",
    ),
    "nothing but ends": (
        {"num_beams": 2, "eos_token_id": list(range(VOCABULARY))},
        InputError,
        "no beam can go on",
    ),
    "a huge bias": ({"sequence_bias": {(5,): 1e39}}, ConfigError, "a number of float32"),
    "a prefix function of nothing": (
        {"prefix_allowed_tokens_fn": lambda prompt, ids: None},
        InputError,
        "found None for prompt 0 after 3 tokens",
    ),
    "a criterion of nothing": (
        {"stopping_criteria": [lambda ids, scores: None]},
        InputError,
        "one for each of the 2 rows, found None",
    ),
    "a criterion of other rows": (
        {"stopping_criteria": [lambda ids, scores: [True, False, True]]},
        InputError,
        r"one for each of the 2 rows, found \[True, False, True\]",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_say_what_is_wrong(backend: Backend, models: Any, what: str) -> None:
    settings, error, message = ERRORS[what]
    with pytest.raises(error, match=message):
        backend.generate(models("pre_norm"), IDS, **{**SETTINGS, **settings})


def test_ragged_prompts(backend: Backend, models: Any) -> None:
    with pytest.raises(InputError, match="Pad them to the same length"):
        models("pre_norm").generate([[5, 6], [7]], **SETTINGS)


def test_a_seed_without_sampling(backend: Backend, models: Any) -> None:
    settings = {**SETTINGS, "seed": 3, "stopping_criteria": [lambda ids, scores: True]}
    with pytest.warns(UserWarning, match="seed has no effect without do_sample=True"):
        backend.generate(models("pre_norm"), IDS, **settings)


@pytest.mark.parametrize("verdict", [[True, False], (True, False), np.array([1, 0])])
def test_a_criterion_may_answer_with_a_list(backend: Backend, models: Any, verdict: Any) -> None:
    criterion = lambda ids, scores: verdict
    found = backend.generate(models("pre_norm"), IDS, **SETTINGS, stopping_criteria=[criterion])
    assert (found[0, 4:] == 1).all() and (found[1, 4:] != 1).all()


def test_numbers_of_numpy(backend: Backend, models: Any) -> None:
    """They are those of Python."""
    plain = {"do_sample": True, "seed": 3, "temperature": 0.5, "eos_token_id": (5, 6)}
    other = {
        "do_sample": np.bool_(True),
        "seed": np.int64(3),
        "temperature": np.float32(0.5),
        "eos_token_id": [np.int64(5), np.int32(6)],
    }
    expected = backend.generate(models("pre_norm"), IDS, **{**SETTINGS, **plain})
    found = backend.generate(models("pre_norm"), IDS, **{**SETTINGS, **other})
    assert found.tolist() == expected.tolist()


class Numbers:
    """A tokenizer whose words are the ids."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{token} " for token in ids)


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_embeddings_are_streamed(backend: Backend, models: Any, skip_prompt: bool) -> None:
    """Their prompt has no tokens to show or to skip."""
    file = io.StringIO()
    streamer = TextStreamer(Numbers(), skip_prompt, file)
    embeds = np.linspace(-1, 1, 2 * 24, dtype=np.float32).reshape(1, 2, 24)
    settings = {**SETTINGS, "inputs_embeds": embeds, "streamer": streamer}
    found = backend.generate(models("pre_norm"), None, **settings)
    assert file.getvalue().split() == [str(token) for token in found[0]]
    assert found.shape == (1, 4)


def test_the_cache_of_guided_rows_is_that_of_the_prompts(backend: Backend, models: Any) -> None:
    settings = {**SETTINGS, "max_new_tokens": 2, "guidance_scale": 1.0}
    plain = backend.generate_output(models("pre_norm"), IDS, **settings)
    guided = backend.generate_output(models("pre_norm"), IDS, **{**settings, "guidance_scale": 2.0})
    for found, expected in zip(guided["past_key_values"], plain["past_key_values"], strict=True):
        assert found[0].shape == expected[0].shape == (2, 4, 4, 6)
        np.testing.assert_allclose(found[0][:, :, :3], expected[0][:, :, :3], atol=1e-5)
