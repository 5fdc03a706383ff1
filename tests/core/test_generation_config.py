# SPDX-License-Identifier: Apache-2.0
"""The options of generation: what they may hold, and their JSON form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import ConfigError, GenerationConfig, InputError, OPTConfig
from opt_core.config import GENERATION_OPTIONS
from opt_core.generation.config import OPTIONS as TABLE
from opt_core.generation.config import OTHER_OPTIONS
from tests.cases import GOLDEN

OPTIONS = GenerationConfig(pad_token_id=1, bos_token_id=2, eos_token_id=2)


def test_every_field_is_an_option() -> None:
    assert [*TABLE] == [f.name for f in dataclasses.fields(GenerationConfig)][:-1]


def test_what_a_configuration_may_say_of_generation_is_an_option() -> None:
    assert {*GENERATION_OPTIONS} <= {*TABLE, *OTHER_OPTIONS}


def test_replace_makes_a_copy() -> None:
    assert OPTIONS.replace(max_length=7).max_length == 7
    assert OPTIONS.max_length == 20
    assert OPTIONS.replace(max_length=None, temperature=None) == OPTIONS  # None says nothing


def test_options_can_be_set_and_are_checked() -> None:
    """`model.generation_config.max_new_tokens = 3`, as users of the reference write."""
    config = OPTIONS.replace()
    before = hash(config)
    config.max_new_tokens = 3
    config.suppress_tokens = [4, 5]
    config.temperature = None  # says nothing
    assert config == OPTIONS.replace(max_new_tokens=3, suppress_tokens=(4, 5))
    assert hash(config) == hash(OPTIONS.replace(max_new_tokens=3, suppress_tokens=(4, 5))) != before
    with pytest.raises(ConfigError, match="num_beams: expected .*found 0"):
        config.num_beams = 0
    assert config.num_beams == 1
    with pytest.raises(AttributeError, match="no option 'max_new_token'.*'max_new_tokens'"):
        config.max_new_token = 3
    config.use_cache = False
    assert config.extra == {"use_cache": False} and OPTIONS.extra == {}


def test_options_that_were_set_beat_the_models_configuration() -> None:
    model = OPTConfig()
    own = GenerationConfig.from_model_config(model)
    model.max_length = 50
    own.max_length = 9
    assert GenerationConfig.of_call(None, own, model, {}).max_length == 9


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(InputError, match="no option 'num_beam'.*'num_beams'"):
        OPTIONS.replace(num_beam=2)
    with pytest.raises(InputError, match="no option 'temprature'.*'temperature'"):
        OPTIONS.replace(temprature=2)
    with pytest.raises(InputError, match="no option 'streamers'.*'streamer'"):
        OPTIONS.replace(streamers=[])
    with pytest.raises(InputError, match=r"no option 'xyz'\.$"):
        OPTIONS.replace(xyz=2)


#: What a field may not hold.
INVALID: dict[str, tuple[Any, ...]] = {
    "temperature": (-1.0, float("inf"), float("nan"), "hot"),
    "top_k": (-1, 1.5, True),
    "top_p": (-0.1, 1.1),
    "min_p": (-0.1, 1.1, True),
    "typical_p": (-0.1, 1.1),
    "epsilon_cutoff": (-0.1, 1.1),
    "eta_cutoff": (-0.1, 1.1),
    "penalty_alpha": (-0.1, 1.1),
    "repetition_penalty": (0.0, float("inf")),
    "encoder_repetition_penalty": (0.0, -1.0),
    "diversity_penalty": (-1.0, "much"),
    "length_penalty": (float("nan"), "long"),
    "guidance_scale": (float("nan"), float("inf"), "strong"),
    "max_length": (0,),
    "max_new_tokens": (0, -3, 2.0),
    "max_time": (0.0, -1.0, "soon"),
    "min_length": (-1,),
    "min_new_tokens": (-1,),
    "num_beams": (0, 1.5),
    "num_beam_groups": (0,),
    "num_return_sequences": (0,),
    "num_assistant_tokens": (0,),
    "num_assistant_tokens_schedule": ("often",),
    "prompt_lookup_num_tokens": (0,),
    "max_matching_ngram_size": (0,),
    "no_repeat_ngram_size": (-1,),
    "early_stopping": ("always", 1),
    "do_sample": ("false", 1),
    "low_memory": ("yes",),
    "renormalize_logits": (1,),
    "output_scores": ("yes",),
    "stop_strings": ([], "", ["a", ""], [3], 3),
    "bad_words_ids": ([], [[]], [3], [[-1]], [["a"]]),
    "force_words_ids": ([], [[]], [[[]]], [3], [["a"]]),
    "sequence_bias": ({}, {(3,): "a"}, [[3, 1.0]], [[[3], float("nan")]], 3, {(): 1.0}),
    "suppress_tokens": ([], [-1], 3),
    "begin_suppress_tokens": ([], [1.5]),
    "forced_decoder_ids": ([], [[3]], [[1, -1]], 3),
    "exponential_decay_length_penalty": ([1], [1, 0.0], [-1, 2.0], 3),
    "dola_layers": ("middle", [], [-1]),
    "cache_implementation": ("hybrid", 3),
}


@pytest.mark.parametrize("name", INVALID)
def test_values_out_of_range(name: str) -> None:
    for value in INVALID[name]:
        with pytest.raises(ConfigError, match=rf"{name}.*: (expected .*found|unknown)"):
            OPTIONS.replace(**{name: value})


#: Options that are lists in JSON.
LISTS: dict[str, Any] = {
    "eos_token_id": [2, 3],
    "forced_eos_token_id": [2, 3],
    "bad_words_ids": [[3], [4, 5]],
    "force_words_ids": [[3, 4], [[5], [6, 7]]],
    "sequence_bias": [[[3], 1.5], [[4, 5], -2.0]],
    "suppress_tokens": [3, 4],
    "begin_suppress_tokens": [3],
    "forced_decoder_ids": [[1, 3], [2, 4]],
    "exponential_decay_length_penalty": [3, 1.5],
    "stop_strings": ["a", "b"],
    "dola_layers": [0, 2],
}


def lists(value: Any) -> Any:
    return [lists(member) for member in value] if isinstance(value, tuple) else value


def test_lists_become_tuples_that_can_be_hashed() -> None:
    config = GenerationConfig(**LISTS)
    hash(config)
    assert all(lists(getattr(config, name)) == value for name, value in LISTS.items())
    assert all(isinstance(getattr(config, name), tuple) for name in LISTS)
    assert GenerationConfig(**{k: getattr(config, k) for k in LISTS}) == config


def test_a_bias_may_be_a_dict() -> None:
    pairs = GenerationConfig(sequence_bias=LISTS["sequence_bias"])
    assert GenerationConfig(sequence_bias={(3,): 1.5, (4, 5): -2.0}) == pairs


def test_one_stop_string_may_stand_alone() -> None:
    assert GenerationConfig(stop_strings="ab").stop_strings == ("ab",)


def test_json_there_and_back(tmp_path: Path) -> None:
    values = {
        **LISTS,
        "max_new_tokens": 5,
        "top_k": None,
        "early_stopping": "never",
        "do_sample": True,
        "_from_model_config": True,
        "foo": 1,
    }
    config = GenerationConfig.from_dict(values)
    config.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    written = json.loads(path.read_text())
    assert {key: written[key] for key in values} == values
    assert GenerationConfig.from_json_file(path) == config


def test_every_field_comes_back(tmp_path: Path) -> None:
    """One by one, each with a value that is not its default."""
    others = {bool: True, int: 7, float: 0.25}
    special = {
        **LISTS,
        "num_assistant_tokens_schedule": "constant",
        "cache_implementation": "static",
    }
    for field in dataclasses.fields(GenerationConfig):
        if field.name == "extra":
            continue
        default = field.default
        value = special.get(field.name, others.get(type(default), 0.5))
        if field.name not in special and default is None:
            value = next(v for v in (7, 0.5, True) if _passes(field.name, v))
        config = GenerationConfig(**{field.name: value})
        assert config != GenerationConfig(), field.name
        config.save_pretrained(tmp_path)
        assert GenerationConfig.from_json_file(tmp_path / "generation_config.json") == config


def _passes(name: str, value: Any) -> bool:
    try:
        TABLE[name].check(name, value)
    except ConfigError:
        return False
    return True


def test_the_references_file() -> None:
    path = GOLDEN / "cases" / "pre_norm" / "generation_config.json"
    config = GenerationConfig.from_json_file(path)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 2, 2)


def test_a_file_of_a_later_version(tmp_path: Path) -> None:
    """Keys that are not known here are kept, and do nothing."""
    values = {
        "bos_token_id": 2,
        "compile_config": None,
        "min_p": 0.1,
        "stop_strings": ["\n"],
        "output_logits": True,
        "token_healing": False,
        "watermarking_config": None,
        "transformers_version": "5.23.0",
    }
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(values))
    config = GenerationConfig.from_json_file(path)
    assert (config.min_p, config.stop_strings, config.output_logits) == (0.1, ("\n",), True)
    assert config.extra["token_healing"] is False
    assert config.replace(max_length=5).extra == config.extra


def test_defaults_of_a_model_without_a_file() -> None:
    model = OPTConfig(eos_token_id=[2, 5], pad_token_id=3, max_length=9, do_sample=True)
    config = GenerationConfig.from_model_config(model)
    assert (config.pad_token_id, config.eos_token_ids) == (3, (2, 5))
    assert (config.max_length, config.do_sample) == (9, True)  # as old config.json files have it


def test_special_tokens_that_a_given_configuration_leaves_out_are_the_models() -> None:
    """It ran on past the end of the text: `GenerationConfig(max_new_tokens=6)` named no end."""
    given = GenerationConfig(max_new_tokens=6)
    found = GenerationConfig.of_call(given, OPTIONS, OPTConfig(), {})
    assert found == given.replace(pad_token_id=1, bos_token_id=2, eos_token_id=2)
    other = GenerationConfig.of_call(given.replace(eos_token_id=7), OPTIONS, OPTConfig(), {})
    assert (other.eos_token_id, other.pad_token_id) == (7, 1)
    assert given.eos_token_id is None  # as it was given


def test_no_end_of_text_can_be_asked_for() -> None:
    given = GenerationConfig(max_new_tokens=6)
    assert not GenerationConfig.of_call(
        given, OPTIONS, OPTConfig(), {"eos_token_id": None}
    ).eos_token_ids


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_length", 50), ("num_beams", 3), ("do_sample", True), ("eos_token_id", 5)],
)
def test_what_is_set_in_the_models_configuration_is_used(name: str, value: Any) -> None:
    """As users of the reference did before there were generation configurations."""
    model = OPTConfig(num_beams=2)
    own = GenerationConfig.from_model_config(model)
    assert GenerationConfig.of_call(None, own, model, {}) == own  # nothing was set since
    setattr(model, name, value)
    with pytest.warns(UserWarning, match=rf"\({name}\).*deprecated.*generation_config"):
        found = GenerationConfig.of_call(None, own, model, {"max_new_tokens": 3})
    assert found == own.replace(**{name: value}, max_new_tokens=3)


def test_options_of_its_own_beat_what_is_set_in_a_models_configuration() -> None:
    model = OPTConfig()
    own = GenerationConfig.from_model_config(model)
    model.max_length = 50
    for other in (own.replace(max_length=9), GenerationConfig(max_length=9)):
        assert GenerationConfig.of_call(None, other, model, {}).max_length == 9


def test_a_configuration_read_from_a_file_follows_the_models(tmp_path: Path) -> None:
    model = OPTConfig(max_length=9)
    own = GenerationConfig(max_length=30, eos_token_id=3).following(model)
    assert GenerationConfig.of_call(None, own, model, {}) == own  # what config.json says is older
    model.max_length = 50
    with pytest.warns(UserWarning, match="max_length"):
        assert GenerationConfig.of_call(None, own, model, {}).max_length == 50


def test_options_of_another_kind() -> None:
    for given, own in (({"max_length": 3}, OPTIONS), (None, {"max_length": 3})):
        with pytest.raises(InputError, match=r"expected an opt_core\.GenerationConfig, found dict"):
            GenerationConfig.of_call(given, own, OPTConfig(), {})


def test_files_of_later_versions_and_empty_lists_load() -> None:
    values = {
        "cache_implementation": "hybrid",
        "num_assistant_tokens_schedule": "heuristic_transient",
        "suppress_tokens": [],
        "sequence_bias": {},
        "num_beams": 3,
    }
    found = GenerationConfig.from_dict(values)
    assert found == GenerationConfig(num_beams=3, extra=found.extra)
    assert found.to_dict() == values


def test_numbers_of_numpy_are_those_of_python() -> None:
    given = GenerationConfig(
        max_new_tokens=np.int64(3),
        do_sample=np.bool_(True),
        eos_token_id=np.array([2, 3]),
        bad_words_ids=[np.array([5, 6])],
    )
    plain = GenerationConfig(
        max_new_tokens=3, do_sample=True, eos_token_id=(2, 3), bad_words_ids=((5, 6),)
    )
    assert given == plain and hash(given) == hash(plain)
    assert json.dumps(given.to_dict()) == json.dumps(plain.to_dict())


def test_ends_are_counted_once() -> None:
    assert GenerationConfig(eos_token_id=(2, 3, 2)).eos_token_ids == (2, 3)


def test_an_argument_of_the_call_is_no_option() -> None:
    with pytest.raises(InputError, match="streamer is an argument of generate"):
        GenerationConfig().replace(streamer=None)


def test_lists_that_are_changed_in_place_are_noticed() -> None:
    model = OPTConfig(eos_token_id=[2], bad_words_ids=[[3]])
    own = GenerationConfig.from_model_config(model)
    model.eos_token_id.append(5)
    model.bad_words_ids.append([4])
    with pytest.warns(UserWarning, match=r"\(bad_words_ids, eos_token_id\)"):
        found = GenerationConfig.of_call(None, own, model, {})
    assert (found.eos_token_ids, found.bad_words_ids) == ((2, 5), ((3,), (4,)))
