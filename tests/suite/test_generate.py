# SPDX-License-Identifier: Apache-2.0
"""Text generation: the reference's tokens, whatever stands beside a row and on either side of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import (
    ConfigError,
    GenerationConfig,
    InputError,
    OPTError,
    OPTTokenizer,
    UnsupportedError,
)
from opt_core.assets import TINY_SUMS
from tests.backends.base import Array, Backend
from tests.cases import CASES, case

SETTINGS = ("greedy", "eos", "eos_list", "min_length", "min_new_tokens", "repetition_penalty")
BATCH, LENGTH = 3, 7
PAD = 1


def options(name: str, setting: str) -> dict[str, Any]:
    settings = case(name).facts["generation"][setting]["settings"]
    return {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}


def prompt(name: str, where: str, setting: str = "greedy") -> dict[str, Array]:
    """`input_ids`, and for a padded batch `attention_mask`."""
    arrays, start = case(name).arrays, f"generate/{setting}/{where}"
    keys = ("input_ids", "attention_mask") if where in ("left", "right") else ("input_ids",)
    return {key: arrays[f"{start}/{key}"] for key in keys}


def alone(name: str, setting: str, row: int) -> list[int]:
    """The new tokens of a row by itself."""
    arrays, start = case(name).arrays, f"generate/{setting}/alone/{row}"
    return arrays[f"{start}/sequences"][0, arrays[f"{start}/input_ids"].shape[1] :].tolist()


# Settings do not depend on the architecture, and compiling a loop for each pair is what takes time.
pairs = pytest.mark.parametrize(
    ("name", "setting"),
    [(name, "greedy") for name in CASES]
    + [(name, setting) for name in ("pre_norm", "untied_gelu") for setting in SETTINGS[1:]],
)
#: Those of backends that compile. The batches hold the rows that are tested alone.
IN_BATCHES = {(name, "greedy") for name in CASES} | {
    (("pre_norm", "untied_gelu")[i % 2], setting) for i, setting in enumerate(SETTINGS[1:])
}
ALONE = {(name, "greedy") for name in ("pre_norm", "post_norm", "untied_gelu")} | {
    ("pre_norm", "eos")
}


@pairs
def test_each_row_alone(backend: Backend, models: Any, name: str, setting: str) -> None:
    if not backend.runs_all_programs and (name, setting) not in ALONE:
        pytest.skip("a program more: make test-slow")
    for row in range(BATCH):
        ids = prompt(name, f"alone/{row}", setting)["input_ids"]
        found = backend.generate(models(name), ids, **options(name, setting))
        assert found[:, : ids.shape[1]].tolist() == ids.tolist()
        assert found[0, ids.shape[1] :].tolist() == alone(name, setting, row)


@pairs
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(backend: Backend, models: Any, name: str, setting: str, side: str) -> None:
    """A row that ends early is filled with pads; the loop ends with the last row.

    `min_length` counts columns, pads included, as the reference does. There a short padded row is
    not the row alone, and right padding is held against the reference's left-padded batch.
    """
    if not backend.runs_all_programs and (name, setting) not in IN_BATCHES:
        pytest.skip("a program more: make test-slow")
    batch = prompt(name, side, setting)
    mask = batch["attention_mask"]
    ids = batch["input_ids"]
    found = backend.generate(models(name), ids, attention_mask=mask, **options(name, setting))
    assert found[:, :LENGTH].tolist() == ids.tolist()
    arrays = case(name).arrays
    expected = arrays[f"generate/{setting}/left/sequences"][:, LENGTH:]
    assert found[:, LENGTH:].tolist() == expected.tolist()
    if setting != "min_length":
        assert expected.tolist() == arrays[f"generate/{setting}/right/new_tokens"].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_is_told_by_the_pads(backend: Backend, models: Any, side: str) -> None:
    batch = prompt("post_norm", side)
    settings = options("post_norm", "greedy")
    found = backend.generate(models("post_norm"), batch["input_ids"], **settings)
    assert found.tolist() == backend.generate(models("post_norm"), **batch, **settings).tolist()
    for row in range(BATCH):
        assert found[row, LENGTH:].tolist() == alone("post_norm", "greedy", row)


def test_pads_that_end_sequences_are_real_tokens(backend: Backend, models: Any) -> None:
    """Where pad and end are one token, a prompt's ids cannot tell padding from text."""
    ids = np.array([[2, 5, 9], [7, 8, 9]])
    settings = {"pad_token_id": 2, "eos_token_id": 2, "max_new_tokens": 4}
    found = backend.generate(models("pre_norm"), ids, **settings)
    mask = np.ones_like(ids)
    given = backend.generate(models("pre_norm"), ids, attention_mask=mask, **settings)
    assert found.tolist() == given.tolist()


def test_pads_on_both_sides_and_in_the_middle(backend: Backend, models: Any) -> None:
    row = prompt("post_norm", "alone/0")["input_ids"][0]  # three tokens
    ids, mask = np.full((1, 6), PAD), np.array([[0, 1, 1, 0, 1, 0]])
    ids[mask == 1] = row
    settings = options("post_norm", "greedy")
    found = backend.generate(models("post_norm"), ids, attention_mask=mask, **settings)
    assert found[0, 6:].tolist() == alone("post_norm", "greedy", 0)


def test_max_length_counts_the_prompt(backend: Backend, models: Any) -> None:
    ids = prompt("pre_norm", "alone/0")["input_ids"]
    settings = {"eos_token_id": None, "pad_token_id": PAD}
    found = backend.generate(models("pre_norm"), ids, max_length=9, **settings)
    assert found[0, 3:].tolist() == alone("pre_norm", "greedy", 0)[:6]
    both = backend.generate(models("pre_norm"), ids, max_length=9, max_new_tokens=2, **settings)
    assert both[0, 3:].tolist() == alone("pre_norm", "greedy", 0)[:2]


def test_starts_from_bos_without_a_prompt(backend: Backend, models: Any) -> None:
    settings = {"max_new_tokens": 4, "eos_token_id": None}
    found = backend.generate(models("galactica"), None, **settings)  # bos_token_id=0
    assert found.shape == (1, 5) and found[0, 0] == 0
    given = backend.generate(models("galactica"), np.array([[0]]), **settings)
    assert found.tolist() == given.tolist()


def test_fills_the_position_table_to_the_brim(backend: Backend, models: Any) -> None:
    """The last token is not fed back, so 40 positions are enough for 41 tokens."""
    ids = prompt("pre_norm", "alone/1")["input_ids"]
    found = backend.generate(models("pre_norm"), ids, max_length=41, eos_token_id=None)
    assert found.shape == (1, 41)
    assert found[0, 7:23].tolist() == alone("pre_norm", "greedy", 1)


# --- what cannot be done --------------------------------------------------------------------------

IDS = np.array([[5, 6, 7]])
ERRORS: dict[str, tuple[Any, dict[str, Any], type[OPTError], str]] = {
    "unknown option": (IDS, {"max_new_token": 3}, InputError, "Did you mean 'max_new_tokens'"),
    "an encoder's": (IDS, {"encoder_no_repeat_ngram_size": 2}, UnsupportedError, "an encoder"),
    "words without beams": (IDS, {"force_words_ids": [[5]]}, InputError, "need num_beams above 1"),
    "uneven groups": (
        IDS,
        {"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0},
        InputError,
        "cannot be divided",
    ),
    "streamed beams": (
        IDS,
        {"num_beams": 2, "streamer": object()},
        InputError,
        "streamer cannot follow beams",
    ),
    "no function": (IDS, {"logits_processor": [3]}, InputError, "expected a function"),
    "no tokenizer": (IDS, {"stop_strings": "x"}, InputError, "needs the tokenizer"),
    "large bad word": (IDS, {"bad_words_ids": [[103]]}, InputError, "103 lies outside"),
    "negatives alone": (IDS, {"negative_prompt_ids": IDS}, InputError, "needs a guidance_scale"),
    "large negative": (
        IDS,
        {"negative_prompt_ids": IDS + 103, "guidance_scale": 2.0},
        InputError,
        "negative_prompt_ids, .* token id 110",
    ),
    "embeddings": (
        None,
        {"inputs_embeds": np.zeros((1, 2, 5), np.float32)},
        InputError,
        "word_embed_proj_dim=24",
    ),
    "seed and noise": (
        IDS,
        {"do_sample": True, "seed": 3, "noise": np.zeros((17, 1, 103), np.float32)},
        InputError,
        "seed or noise, not both",
    ),
    "copies of greedy": (IDS, {"num_return_sequences": 2}, InputError, "needs do_sample=True"),
    "temperature": (IDS, {"temperature": -1.0}, ConfigError, "temperature: expected a number"),
    "pad": (IDS, {"pad_token_id": 103}, InputError, "pad_token_id=103 lies outside"),
    "not a flag": (IDS, {"do_sample": "false"}, ConfigError, "do_sample: expected True or False"),
    "not ids": (IDS + 0.5, {}, InputError, "input_ids: expected whole numbers"),
    "half a mask": (IDS, {"attention_mask": IDS * 0.5}, InputError, "expected 1 at real tokens"),
    "top_p": (IDS, {"top_p": 1.5}, ConfigError, "top_p: expected a number from 0 to 1"),
    "no room": (IDS, {"max_length": 3}, InputError, "nothing is left to generate"),
    "too long": (IDS, {"max_new_tokens": 39}, InputError, r"need 41 positions, .* has 40"),
    "eos": (IDS, {"eos_token_id": 103}, InputError, "eos_token_id=103 lies outside"),
    "large id": (np.array([[5, 103]]), {}, InputError, "token id 103, .* ids 0 to 102"),
    "negative id": (np.array([[5, -2]]), {}, InputError, "token id -2"),
    "empty batch": (
        np.zeros((0, 3), np.int64),
        {},
        InputError,
        r"neither of them 0, found \(0, 3\)",
    ),
    "empty rows": (
        np.zeros((2, 0), np.int64),
        {},
        InputError,
        r"neither of them 0, found \(2, 0\)",
    ),
    "one dimension": (np.array([5, 6]), {}, InputError, r"expected \[batch, tokens\].*\(2,\)"),
    "all pads": (np.array([[5, 6], [PAD, PAD]]), {}, InputError, "Row 1 .* is all padding"),
    "mask shape": (
        IDS,
        {"attention_mask": np.ones((1, 2), np.int64)},
        InputError,
        "attention_mask",
    ),
    "mask values": (IDS, {"attention_mask": np.array([[0, 2, 1]])}, InputError, "attention_mask"),
    "noise": (
        IDS,
        {"do_sample": True, "max_new_tokens": 2, "noise": np.zeros((2, 1, 5), np.float32)},
        InputError,
        r"noise: expected \(2, 1, 103\), found \(2, 1, 5\)",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_say_what_is_wrong(backend: Backend, models: Any, what: str) -> None:
    ids, settings, error, message = ERRORS[what]
    with pytest.raises(error, match=message):
        backend.generate(models("pre_norm"), ids, **settings)


def test_no_prompt_and_no_bos(backend: Backend, models: Any) -> None:
    with pytest.raises(InputError, match="no bos_token_id"):
        backend.generate(models("pre_norm"), None, bos_token_id=None)


def test_ends_without_a_pad_token_are_filled_with_eos(backend: Backend, models: Any) -> None:
    """The reference does the same, with a warning."""
    settings = {**options("pre_norm", "eos"), "pad_token_id": None}
    batch = prompt("pre_norm", "left")
    with pytest.warns(UserWarning, match="pad_token_id is not set"):
        found = backend.generate(models("pre_norm"), **batch, **settings)[:, LENGTH:]
    expected = case("pre_norm").arrays["generate/eos/left/sequences"][:, LENGTH:]
    eos = settings["eos_token_id"][0]
    ended = np.cumsum(expected == eos, axis=1) - (expected == eos) > 0
    assert found.tolist() == np.where(ended, eos, expected).tolist() and ended.any()


def test_generation_leaves_the_prompt_as_it_is(backend: Backend, models: Any) -> None:
    batch = {key: value.copy() for key, value in prompt("post_norm", "right").items()}
    before = {key: value.copy() for key, value in batch.items()}
    backend.generate(models("post_norm"), **batch, max_new_tokens=3)
    assert all(np.array_equal(batch[key], before[key]) for key in batch)


STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.1},
    "beams": {"num_beams": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "sampled beams": {"num_beams": 2, "do_sample": True, "temperature": 0.1},
    "constrained": {"num_beams": 3, "force_words_ids": ((6,),)},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "DoLa": {"dola_layers": "low"},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_given_configuration_ends_with_the_text(backend: Backend, strategy: str) -> None:
    """The embedded model says `</s>` after an answer; a configuration that names no end ran past it."""
    if not backend.runs_all_programs and strategy not in ("greedy", "beams"):
        pytest.skip("a program more: make test-slow")
    model = backend.load(TINY_SUMS)
    ids = np.array(OPTTokenizer.from_pretrained(TINY_SUMS)(["two plus two is"])["input_ids"])
    given = {**STRATEGIES[strategy], "max_new_tokens": 12}
    call = {"seed": 0} if given.get("do_sample") else {}
    found = backend.generate(model, ids, generation_config=GenerationConfig(**given), **call)
    assert found.tolist() == backend.generate(model, ids, **given, **call).tolist()
    own = backend.config(model)
    assert own.eos_token_id in found[0, ids.shape[1] :]
    past = backend.generate(model, ids, **given, **call, eos_token_id=None)
    assert past.shape[1] == ids.shape[1] + 12 > found.shape[1]


def test_what_is_set_in_the_models_configuration_is_used(backend: Backend) -> None:
    """`model.config.max_length = 9`, as users of the reference wrote before 4.26."""
    model = backend.load(TINY_SUMS)
    ids = np.array([[2, 5, 6, 7]])
    backend.config(model).max_length = 9
    backend.config(model).eos_token_id = None
    with pytest.warns(UserWarning, match=r"\(eos_token_id, max_length\).*deprecated"):
        assert backend.generate(model, ids).shape == (1, 9)
    assert backend.generate(model, ids, generation_config=GenerationConfig(max_length=6)).shape == (
        1,
        6,
    )


def test_the_models_own_settings_can_be_set(backend: Backend) -> None:
    """`model.generation_config.max_new_tokens = 3`, as users of the reference write."""
    model = backend.load(TINY_SUMS)
    ids = np.array([[2, 5, 6, 7]])
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = None
    assert backend.generate(model, ids).shape == (1, 7)
    assert backend.load(TINY_SUMS).generation_config.max_new_tokens is None


def test_what_is_set_in_the_models_configuration_is_saved(backend: Backend, tmp_path: Path) -> None:
    """generation_config.json kept the former settings, which won when the model was loaded."""
    model = backend.load(TINY_SUMS)
    ids = np.array([[2, 5, 6, 7]])
    backend.config(model).max_length = 9
    backend.config(model).eos_token_id = None
    backend.save(model, tmp_path)
    again = backend.load(tmp_path)
    assert backend.generate(again, ids).shape == (1, 9)
    assert backend.load(tmp_path, eos_token_id=2).generation_config.eos_token_id == 2
