# SPDX-License-Identifier: Apache-2.0
"""From options to a plan: what a loop will do, decided before it runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from opt_core import (
    GenerationConfig,
    InputError,
    OPTConfig,
    PhrasalConstraint,
    UnsupportedError,
)
from opt_core.generation import strategies as s
from opt_core.generation.hooks import Hooks
from opt_core.generation.plan import BUCKET, PromptLengths, make_plan

MODEL = OPTConfig(vocab_size=30, hidden_size=8, num_attention_heads=2, max_position_embeddings=20)
OPTIONS = GenerationConfig(pad_token_id=1, bos_token_id=2, eos_token_id=2)


def plan(prompt_length: int = 5, hooks: dict[str, Any] | None = None, **options: Any) -> Any:
    return make_plan(OPTIONS.replace(**options), MODEL, prompt_length, Hooks(**(hooks or {})))


def test_defaults() -> None:
    found = plan()
    assert found.strategy == s.Search()
    assert found.processors == ()
    assert (found.prompt_length, found.max_new_tokens, found.capacity) == (5, 15, 19)
    assert (found.eos_token_ids, found.pad_token_id, found.num_return_sequences) == ((2,), 1, 1)
    assert not (found.is_guided or found.needs_host or found.is_padded or found.past_length)


def test_a_plan_is_a_key() -> None:
    """The static argument of a compiled loop: equal plans share one compilation."""
    options = {"do_sample": True, "temperature": 0.5, "sequence_bias": {(3, 4): 1.0}}
    first, second = plan(**options), plan(**options)
    assert first == second and hash(first) == hash(second)
    assert first != plan(**{**options, "temperature": 0.6})
    with pytest.raises(AttributeError):
        first.max_new_tokens = 3


NUMBERS: dict[str, Any] = {
    "do_sample": True,
    "guidance_scale": 1.5,
    "encoder_repetition_penalty": 1.2,
    "repetition_penalty": 1.1,
    "min_length": 6,
    "min_new_tokens": 2,
    "temperature": 0.7,
    "top_p": 0.9,
    "min_p": 0.05,
    "typical_p": 0.8,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.02,
}


def test_numbers_are_no_part_of_the_key() -> None:
    """One compiled loop serves all their values."""
    first = plan(**NUMBERS, top_k=7)
    other = {name: value * 1.01 for name, value in NUMBERS.items() if isinstance(value, float)}
    second = plan(**{**NUMBERS, **other, "min_length": 7, "min_new_tokens": 3}, top_k=7)
    ends = plan(do_sample=True).numbers  # of sequences, and what follows them
    numbers = [v for name, v in NUMBERS.items() if name != "do_sample"]
    numbers[3:5] = [numbers[3], ends[0], numbers[4], ends[0]]  # which must not come yet
    assert first.numbers == (*ends, *numbers)
    assert {*first.numbers} & {*second.numbers} == {*ends, 2}
    assert first != second and first.key == second.key and hash(first.key) == hash(second.key)
    assert first.key.with_numbers(second.numbers) == second
    assert plan(**NUMBERS, top_k=8).key != first.key  # which is a shape


@pytest.mark.parametrize(
    ("one", "other", "shaped"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 5}, {"eos_token_id": [2, 5]}),
        ({"pad_token_id": 1}, {"pad_token_id": 0}, {}),
        ({"suppress_tokens": [4]}, {"suppress_tokens": [5]}, {"suppress_tokens": [4, 5]}),
        ({"bad_words_ids": [[4, 5]]}, {"bad_words_ids": [[6, 7]]}, {"bad_words_ids": [[4]]}),
        ({"sequence_bias": {(4, 5): 1.0}}, {"sequence_bias": {(5, 6): 2.0}}, {}),
        ({"forced_eos_token_id": 2}, {"forced_eos_token_id": 3}, {}),
        ({"forced_bos_token_id": 2}, {"forced_bos_token_id": 3}, {}),
        ({"forced_decoder_ids": [(1, 4)]}, {"forced_decoder_ids": [(2, 5)]}, {}),
        ({"begin_suppress_tokens": [4]}, {"begin_suppress_tokens": [6]}, {}),
        ({"length_penalty": 0.5}, {"length_penalty": 2.0}, {}),
        ({"penalty_alpha": 0.5, "top_k": 4}, {"penalty_alpha": 0.7, "top_k": 4}, {}),
    ],
)
def test_ids_and_weights_are_no_part_of_the_key(
    one: dict[str, Any], other: dict[str, Any], shaped: dict[str, Any]
) -> None:
    """How many there are is: they are told to the same loop."""
    beams = {"num_beams": 2} if "length_penalty" in one else {}
    first, second = plan(**one, **beams), plan(**other, **beams)
    assert first != second and first.key == second.key
    assert first.key.with_numbers(second.numbers) == second
    if shaped:
        assert plan(**shaped).key != first.key


# --- strategies -----------------------------------------------------------------------------------

BEAMS = {"num_beams": 4}
WORD = PhrasalConstraint([3, 4])
ASSISTANT = {"assistant_model": object()}
STRATEGIES: dict[str, tuple[dict[str, Any], dict[str, Any], s.Strategy]] = {
    "greedy": ({}, {}, s.Search()),
    "top_k alone": ({"top_k": 50}, {}, s.Search()),
    "sample": ({"do_sample": True, "num_return_sequences": 3}, {}, s.Search(3, True)),
    "beams": (
        {**BEAMS, "num_return_sequences": 4, "length_penalty": 2, "early_stopping": "never"},
        {},
        s.BeamSearch(4, length_penalty=2.0, early_stopping="never"),
    ),
    "beam sampling": ({**BEAMS, "do_sample": True}, {}, s.BeamSearch(4, True)),
    "beams beat contrast": ({**BEAMS, "penalty_alpha": 0.6, "top_k": 4}, {}, s.BeamSearch(4)),
    "groups": (
        {**BEAMS, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {},
        s.BeamSearch(4, num_groups=2),
    ),
    "words": (
        {**BEAMS, "force_words_ids": [[3, 4], [[5], [6, 7]]]},
        {},
        s.ConstrainedBeamSearch(4),
    ),
    "constraints": (BEAMS, {"constraints": [WORD]}, s.ConstrainedBeamSearch(4)),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, {}, s.ContrastiveSearch(1, False, 4, 0.6)),
    "low memory": (
        {"penalty_alpha": 0.5, "top_k": 6, "low_memory": True},
        {},
        s.ContrastiveSearch(1, False, 6, 0.5, True),
    ),
    "no contrast": ({"penalty_alpha": 0.0, "top_k": 4}, {}, s.Search()),
    "no contrast in one": ({"penalty_alpha": 0.6, "top_k": 1}, {}, s.Search()),
    "no contrast in samples": (
        {"penalty_alpha": 0.6, "top_k": 4, "do_sample": True},
        {},
        s.Search(do_sample=True),
    ),
    "assisted": ({"num_assistant_tokens": 7}, ASSISTANT, s.AssistedSearch(num_tokens=7)),
    "assisted sampling": (
        {"do_sample": True, "num_assistant_tokens_schedule": "constant"},
        ASSISTANT,
        s.AssistedSearch(1, True, 5, True),
    ),
    "lookup": (
        {"prompt_lookup_num_tokens": 3},
        {},
        s.AssistedSearch(num_tokens=3, constant=True, lookup_size=2),
    ),
    "long lookup": (
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 4},
        {},
        s.AssistedSearch(num_tokens=3, constant=True, lookup_size=4),
    ),
}


@pytest.mark.filterwarnings("ignore:.*has no effect without")
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies(name: str) -> None:
    options, hooks, expected = STRATEGIES[name]
    found = plan(hooks=hooks, **options)
    if isinstance(found.strategy, s.ConstrainedBeamSearch):
        assert found.strategy.constraints
        expected = replace(expected, constraints=found.strategy.constraints)
    assert found.strategy == expected
    assert found.needs_host == isinstance(expected, s.ConstrainedBeamSearch | s.AssistedSearch)


def test_every_strategy_is_among_them() -> None:
    assert {type(row[2]) for row in STRATEGIES.values()} == set(s.STRATEGIES)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "words without beams": ({"force_words_ids": [[3]]}, {}, "need num_beams above 1"),
    "constraints without beams": ({}, {"constraints": [WORD]}, "need num_beams above 1"),
    "words and samples": (
        {**BEAMS, "force_words_ids": [[3]], "do_sample": True},
        {},
        "constrained-beam search cannot sample",
    ),
    "words and groups": (
        {**BEAMS, "force_words_ids": [[3]], "num_beam_groups": 2, "diversity_penalty": 1.0},
        {},
        "ask for constrained-beam and for group-beam decoding at once",
    ),
    "groups and samples": (
        {**BEAMS, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True},
        {},
        "group-beam search cannot sample",
    ),
    "uneven groups": (
        {**BEAMS, "num_beam_groups": 3, "diversity_penalty": 1.0},
        {},
        "num_beams=4 cannot be divided into num_beam_groups=3",
    ),
    "equal groups": ({**BEAMS, "num_beam_groups": 2}, {}, "needs a diversity_penalty above 0"),
    "diversity of nothing": ({**BEAMS, "diversity_penalty": 1.0}, {}, "between groups of beams"),
    "assistant and beams": (BEAMS, ASSISTANT, "assisted decoding has no beams"),
    "lookup and beams": (
        {**BEAMS, "prompt_lookup_num_tokens": 3},
        {},
        "prompt-lookup decoding has no beams",
    ),
    "assistant and lookup": (
        {"prompt_lookup_num_tokens": 3},
        ASSISTANT,
        "for assisted and for prompt-lookup decoding at once",
    ),
    "assistant and contrast": (
        {"penalty_alpha": 0.6, "top_k": 4},
        ASSISTANT,
        "for contrastive and for assisted decoding at once",
    ),
    "more than the beams": (
        {**BEAMS, "num_return_sequences": 5},
        {},
        "num_return_sequences=5 needs do_sample=True or as many beams",
    ),
    "copies of greedy": (
        {"num_return_sequences": 2},
        {},
        "greedy decoding with num_beams=1 finds 1",
    ),
    "decay without an end": (
        {"exponential_decay_length_penalty": [2, 1.5], "eos_token_id": None},
        {},
        "needs an eos_token_id",
    ),
    "cold": ({"do_sample": True, "temperature": 0.0}, {}, "sampling needs at least"),
    "streamed beams": (BEAMS, {"streamer": object()}, "streamer cannot follow beams"),
    "stop strings": ({"stop_strings": "x"}, {}, "stop_strings needs the tokenizer"),
    "no function": ({}, {"logits_processor": [3]}, r"logits_processor\[0\]: expected a function"),
    "no list": (
        {},
        {"stopping_criteria": len},
        "stopping_criteria: expected a list, found builtin",
    ),
    "min_length": ({"min_length": 9, "max_length": 8}, {}, "min_length=9 cannot be .* end at 8"),
    "min_new_tokens": (
        {"min_new_tokens": 4, "max_new_tokens": 3},
        {},
        "min_new_tokens=4 is more than the 3 tokens",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused(name: str) -> None:
    options, hooks, message = CONTRADICTIONS[name]
    with pytest.raises(InputError, match=message):
        plan(hooks=hooks, **options)


# --- warnings -------------------------------------------------------------------------------------

UNUSED = {
    "do_sample=True": {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "typical_p": 0.5,
        "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.1,
    },
    "num_beams above 1": {
        "early_stopping": True,
        "length_penalty": 2.0,
        "num_beam_groups": 2,
        "diversity_penalty": 1.0,
    },
    "contrastive search": {"penalty_alpha": 0.6, "low_memory": True},
    "an assistant_model": {
        "num_assistant_tokens": 3,
        "num_assistant_tokens_schedule": "constant",
    },
    "prompt_lookup_num_tokens": {"max_matching_ngram_size": 3},
    "return_dict_in_generate=True": {
        "output_scores": True,
        "output_logits": True,
        "output_attentions": True,
        "output_hidden_states": True,
    },
}


@pytest.mark.parametrize(
    ("name", "value", "purpose"),
    [(name, value, purpose) for purpose, row in UNUSED.items() for name, value in row.items()],
)
def test_options_without_effect_say_so(name: str, value: Any, purpose: str) -> None:
    options = {"top_k": 1, "do_sample": True} if name == "penalty_alpha" else {}
    with pytest.warns(UserWarning, match=f"{name}={value} has no effect without {purpose}"):
        found = plan(**{name: value}, **options)
    assert found == plan(**options)


def test_options_with_an_effect_do_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(penalty_alpha=0.6, top_k=4, low_memory=True)
        groups = {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.5}
        plan(**groups, early_stopping=True, length_penalty=0.5)
        plan(do_sample=True, **UNUSED["do_sample=True"])
        plan(hooks=ASSISTANT, **UNUSED["an assistant_model"])
        plan(prompt_lookup_num_tokens=3, max_matching_ngram_size=3)
        plan(return_dict_in_generate=True, **UNUSED["return_dict_in_generate=True"])


# --- lengths and ids ------------------------------------------------------------------------------


def test_lengths() -> None:
    assert plan(max_length=8).max_new_tokens == 3
    assert plan(max_length=8, max_new_tokens=7).max_new_tokens == 7
    assert plan(max_new_tokens=16).capacity == 20  # the whole position table
    with pytest.raises(InputError, match="need 21 positions, but the position table has 20"):
        plan(max_new_tokens=17)
    with pytest.raises(InputError, match="prompt has 5 tokens, but max_length=5 .*max_new_tokens"):
        plan(max_length=5)


def test_lengths_of_padded_prompts_and_of_embeddings() -> None:
    """max_length counts columns, positions count real tokens, embeddings alone count nothing."""
    padded = make_plan(OPTIONS, MODEL, PromptLengths(9, 9, 4, is_padded=True))
    assert (padded.prompt_length, padded.max_new_tokens, padded.is_padded) == (9, 11, True)
    wide = OPTIONS.replace(max_new_tokens=17)
    assert make_plan(wide, MODEL, PromptLengths(9, 9, 4, is_padded=True)).capacity == 25
    embeds = make_plan(OPTIONS.replace(max_length=8), MODEL, PromptLengths(9, 0, 9))
    assert (embeds.prompt_length, embeds.max_new_tokens) == (9, 8)


def test_buckets() -> None:
    found = make_plan(OPTIONS, MODEL, PromptLengths(9, 9, 9, past=4)).bucketed()
    assert (found.prompt_length, found.max_new_tokens) == (BUCKET, BUCKET)
    assert found.past_length == BUCKET - 5 and found.is_padded
    assert plan(7, max_new_tokens=3).bucketed() == plan(2, max_new_tokens=9).bucketed()
    assert plan().bucketed().past_length == 0


def test_ends() -> None:
    assert plan(eos_token_id=[2, 7]).eos_token_ids == (2, 7)
    assert plan(eos_token_id=None).eos_token_ids == ()
    assert plan(eos_token_id=None, pad_token_id=None).pad_token_id == 0
    with pytest.warns(UserWarning, match="pad_token_id is not set: .* filled with 7"):
        assert plan(eos_token_id=(7, 2), pad_token_id=None).pad_token_id == 7


OUTSIDE: dict[str, Callable[[int], Any]] = {
    "eos_token_id": lambda token: token,
    "pad_token_id": lambda token: token,
    "forced_bos_token_id": lambda token: token,
    "forced_eos_token_id": lambda token: [3, token],
    "suppress_tokens": lambda token: [token],
    "begin_suppress_tokens": lambda token: [3, token],
    "forced_decoder_ids": lambda token: [[6, token]],
    "bad_words_ids": lambda token: [[3], [4, token]],
    "sequence_bias": lambda token: {(3, token): 1.0},
    "force_words_ids": lambda token: [[3], [[4], [5, token]]],
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_ids_outside_the_vocabulary_are_refused(name: str) -> None:
    options = {"num_beams": 2} if name == "force_words_ids" else {}
    plan(**{name: OUTSIDE[name](29)}, **options)
    with pytest.raises(InputError, match="30 lies outside the vocabulary of 30 tokens"):
        plan(**{name: OUTSIDE[name](30)}, **options)


def test_negative_ids_are_refused() -> None:
    for name in ("eos_token_id", "pad_token_id"):
        with pytest.raises(InputError, match=f"{name}=-1 lies outside"):
            plan(**{name: -1})


def test_options_of_encoders_are_refused_unless_they_say_nothing() -> None:
    with pytest.raises(UnsupportedError, match="encoder_no_repeat_ngram_size=2 is for models with"):
        plan(encoder_no_repeat_ngram_size=2)
    neutral = {"encoder_no_repeat_ngram_size": 0, "decoder_start_token_id": 3, "use_cache": False}
    assert plan(**neutral) == plan()


def test_options_of_an_old_config_are_not_forgotten() -> None:
    """Before generation_config.json, they stood in config.json."""
    config = OPTConfig(num_beams=4, temperature=None, max_length=33)
    options = GenerationConfig.from_model_config(config)
    assert (options.max_length, options.temperature) == (33, 1.0)
    assert make_plan(options, config, 5).strategy == s.BeamSearch(4)
