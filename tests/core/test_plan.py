# SPDX-License-Identifier: Apache-2.0
"""From options to a plan: what a loop will do, decided before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import ConfigError, GenerationConfig, InputError, OPTConfig, UnsupportedError
from opt_core.generation import processors as p
from opt_core.generation.config import UNSUPPORTED
from opt_core.generation.plan import GenerationMode, make_plan
from opt_core.generation.prompts import check_prompts, infers_mask
from tests.cases import GOLDEN

MODEL = OPTConfig(vocab_size=30, hidden_size=8, num_attention_heads=2, max_position_embeddings=20)
OPTIONS = GenerationConfig(pad_token_id=1, bos_token_id=2, eos_token_id=2)


def plan(prompt_length: int = 5, **options: Any) -> Any:
    return make_plan(OPTIONS.replace(**options), MODEL, prompt_length)


def test_defaults() -> None:
    found = plan()
    assert found.mode is GenerationMode.GREEDY
    assert found.processors == ()
    assert (found.prompt_length, found.max_new_tokens, found.capacity) == (5, 15, 19)
    assert (found.eos_token_ids, found.pad_token_id, found.num_return_sequences) == ((2,), 1, 1)


def test_a_plan_is_a_key() -> None:
    """The static argument of a compiled loop: equal plans share one compilation."""
    first, second = plan(temperature=0.5, do_sample=True), plan(temperature=0.5, do_sample=True)
    assert first == second and hash(first) == hash(second)
    assert first != plan(temperature=0.6, do_sample=True)
    with pytest.raises(AttributeError):
        first.max_new_tokens = 3


def test_the_order_of_processors_is_the_references() -> None:
    with np.load(GOLDEN / "processors.npz") as file:
        order = file["order"].tolist()
    found = plan(
        3,
        do_sample=True,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        repetition_penalty=1.5,
        min_length=5,
        min_new_tokens=3,
    ).processors
    assert found == (
        p.RepetitionPenalty(1.5),
        p.MinLength(5, (2,)),
        p.MinNewTokens(3, (2,)),
        p.Temperature(0.5),
        p.TopK(3),
        p.TopP(0.9),
    )
    endings = ("LogitsProcessor", "LengthLogitsProcessor", "LogitsWarper")
    for processor, name in zip(found, order, strict=True):
        assert name in [type(processor).__name__ + end for end in endings]
    assert tuple(type(processor) for processor in found) == p.PROCESSORS


def test_options_that_say_nothing_make_no_processor() -> None:
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    assert plan(do_sample=True, **neutral).processors == ()
    assert plan(do_sample=True, top_k=None, top_p=None).processors == ()
    assert plan(do_sample=True).processors == (p.TopK(30),)  # 50 by default, 30 in the vocabulary
    assert plan(min_length=5).processors == ()  # the prompt is as long
    assert plan(min_length=6, eos_token_id=None).processors == ()


def test_sampling_options_do_nothing_to_greedy_decoding_and_say_so() -> None:
    for options in ({"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}):
        with pytest.warns(UserWarning, match="has no effect without do_sample=True"):
            assert plan(**options).processors == ()


def test_lengths_that_cannot_be_reached() -> None:
    with pytest.raises(InputError, match=r"min_length=9 cannot be reached.* end at 8"):
        plan(min_length=9, max_length=8)
    with pytest.raises(InputError, match=r"min_new_tokens=4 is more than the 3 tokens"):
        plan(min_new_tokens=4, max_new_tokens=3)


def test_lengths() -> None:
    assert plan(max_length=8).max_new_tokens == 3
    assert plan(max_length=8, max_new_tokens=7).max_new_tokens == 7
    assert plan(max_new_tokens=16).capacity == 20  # the whole position table
    with pytest.raises(InputError, match="need 21 positions, but the position table has 20"):
        plan(max_new_tokens=17)
    with pytest.raises(InputError, match="prompt has 5 tokens, but max_length=5 .*max_new_tokens"):
        plan(max_length=5)


def test_ends() -> None:
    assert plan(eos_token_id=[2, 7]).eos_token_ids == (2, 7)
    assert plan(eos_token_id=None).eos_token_ids == ()
    assert plan(eos_token_id=None, pad_token_id=None).pad_token_id == 0
    with pytest.warns(UserWarning, match="pad_token_id is not set: .* filled with 7"):
        assert plan(eos_token_id=(7, 2), pad_token_id=None).pad_token_id == 7
    for wrong in (30, -1):
        with pytest.raises(InputError, match=f"eos_token_id={wrong} lies outside"):
            plan(eos_token_id=wrong)


def test_copies_need_sampling() -> None:
    assert plan(do_sample=True, num_return_sequences=3).num_return_sequences == 3
    with pytest.raises(InputError, match="num_return_sequences=2 needs do_sample=True"):
        plan(num_return_sequences=2)


OTHER: dict[str, Any] = {
    "num_beams": 4,
    "num_beam_groups": 2,
    "penalty_alpha": 0.6,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]],
    "typical_p": 0.5,
    "forced_eos_token_id": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
    "max_time": 3.0,
}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_there_yet_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name}=.* is not supported in this release"):
        plan(**{name: OTHER[name]})


def test_what_is_not_there_may_say_nothing() -> None:
    assert plan(**UNSUPPORTED) == plan()
    assert plan(**dict.fromkeys(UNSUPPORTED)) == plan()  # None, as some callers write
    assert (
        plan(bad_words_ids=[], use_cache=False, length_penalty=0.6, early_stopping=True) == plan()
    )


def test_options_of_an_old_config_are_not_forgotten() -> None:
    """Before generation_config.json, they stood in config.json."""
    config = OPTConfig(num_beams=4, temperature=None, max_length=33)
    options = GenerationConfig.from_model_config(config)
    assert (options.max_length, options.temperature) == (33, 1.0)
    with pytest.raises(UnsupportedError, match="num_beams=4"):
        make_plan(options, config, 5)


def test_none_says_the_default() -> None:
    assert OPTIONS.replace(max_length=None, temperature=None).max_length == 20


def test_a_pad_outside_the_vocabulary_is_refused() -> None:
    for pad in (-1, 30):
        with pytest.raises(InputError, match=f"pad_token_id={pad} lies outside the vocabulary"):
            plan(pad_token_id=pad)


def test_sampling_needs_a_temperature() -> None:
    with pytest.raises(InputError, match="sampling needs at least"):
        plan(do_sample=True, temperature=0.0)


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(InputError, match="no option 'num_beam'.*'num_beams'"):
        plan(num_beam=2)
    with pytest.raises(InputError, match="no option 'temprature'.*'temperature'"):
        plan(temprature=2)
    with pytest.raises(InputError, match=r"no option 'xyz'\.$"):
        plan(xyz=2)


INVALID: dict[str, tuple[Any, ...]] = {
    "temperature": (-1.0, float("inf"), float("nan"), "hot"),
    "top_k": (-1, 1.5, True),
    "top_p": (-0.1, 1.1),
    "repetition_penalty": (0.0, float("inf")),
    "max_length": (0,),
    "max_new_tokens": (0, -3, 2.0),
    "min_length": (-1,),
    "min_new_tokens": (-1,),
    "num_return_sequences": (0,),
}


@pytest.mark.parametrize("name", INVALID)
def test_values_out_of_range(name: str) -> None:
    for value in INVALID[name]:
        with pytest.raises(ConfigError, match=f"{name}: expected a .*found"):
            OPTIONS.replace(**{name: value})


# --- GenerationConfig -----------------------------------------------------------------------------


def test_replace_makes_a_copy() -> None:
    assert OPTIONS.replace(max_length=7).max_length == 7
    assert OPTIONS.max_length == 20


def test_json_there_and_back(tmp_path: Path) -> None:
    values = {"max_new_tokens": 5, "eos_token_id": [2, 3], "_from_model_config": True, "foo": 1}
    config = GenerationConfig.from_dict(values)
    assert config.eos_token_ids == (2, 3)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert {key: written[key] for key in values} == values
    assert GenerationConfig.from_json_file(tmp_path / "generation_config.json") == config


def test_the_references_file() -> None:
    path = GOLDEN / "cases" / "pre_norm" / "generation_config.json"
    config = GenerationConfig.from_json_file(path)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 2, 2)
    assert make_plan(config, MODEL, 3).eos_token_ids == (2,)


def test_defaults_of_a_model_without_a_file() -> None:
    model = MODEL.replace(eos_token_id=[2, 5], pad_token_id=3, max_length=9, do_sample=True)
    config = GenerationConfig.from_model_config(model)
    assert (config.pad_token_id, config.eos_token_ids) == (3, (2, 5))
    assert (config.max_length, config.do_sample) == (9, True)  # as old config.json files have it


# --- prompts --------------------------------------------------------------------------------------


def test_a_mask_is_told_by_pads_that_are_no_ends() -> None:
    assert infers_mask(OPTIONS)
    assert not infers_mask(OPTIONS.replace(pad_token_id=2))
    assert not infers_mask(OPTIONS.replace(pad_token_id=None))
    assert not infers_mask(OPTIONS.replace(eos_token_id=(2, 1)))


IDS = np.array([[5, 6], [7, 8]])


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (IDS, np.ones((2, 3), int), r"expected the shape of input_ids, \(2, 2\), found \(2, 3\)"),
        (IDS, np.array([[1, 1], [0, 2]]), "1 at real tokens and 0 at pads"),
        (IDS, np.array([[1, 1], [0, 0]]), "Row 1 .* all padding"),
        (IDS + 23, np.ones((2, 2), int), "token id 31, .* ids 0 to 29"),
        (IDS - 6, np.ones((2, 2), int), "token id -1"),
    ],
)
def test_prompts_that_do_not_fit(ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_prompts(ids, mask, MODEL)
    check_prompts(IDS, np.array([[1, 1], [0, 1]]), MODEL)
