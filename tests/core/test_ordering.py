# SPDX-License-Identifier: Apache-2.0
"""Which processors options make, and in which order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opt_core import GenerationConfig, OPTConfig
from opt_core.generation import processors as p
from opt_core.generation.hooks import Hooks
from opt_core.generation.ordering import plan_processors
from opt_core.generation.plan import make_plan
from tests.cases import GOLDEN

MODEL = OPTConfig(vocab_size=30, hidden_size=8, num_attention_heads=2, max_position_embeddings=20)
OPTIONS = GenerationConfig(pad_token_id=1, bos_token_id=2, eos_token_id=2)


def plan(prompt_length: int = 5, hooks: dict[str, Any] | None = None, **options: Any) -> Any:
    return make_plan(OPTIONS.replace(**options), MODEL, prompt_length, Hooks(**(hooks or {})))


def function(*arguments: Any) -> Any:
    return arguments[-1]


GROUPS = {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.5}
FORCED = {"forced_decoder_ids": [[6, 3], [7, 4]]}
SAMPLE = {"do_sample": True, "top_k": 0}
#: Options and the processors that they make.
PROCESSORS: dict[str, tuple[dict[str, Any], tuple[p.LogitsProcessor, ...]]] = {
    "guidance": ({"guidance_scale": 2}, (p.Guidance(2.0),)),
    "no guidance": ({"guidance_scale": 1}, ()),
    "sequence_bias": (
        {"sequence_bias": {(3,): 1, (4, 5): -2.0}},
        (p.SequenceBias((((3,), 1.0), ((4, 5), -2.0))),),
    ),
    "sequence_bias as a list": (
        {"sequence_bias": [[[4, 5], -2]]},
        (p.SequenceBias((((4, 5), -2.0),)),),
    ),
    "groups": (GROUPS, (p.Diversity(0.5),)),
    "encoder_repetition_penalty": (
        {"encoder_repetition_penalty": 1.5},
        (p.PromptRepetitionPenalty(1.5),),
    ),
    "repetition_penalty": ({"repetition_penalty": 1.5}, (p.RepetitionPenalty(1.5),)),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 2}, (p.NoRepeatNGram(2),)),
    "bad_words_ids": (
        {"bad_words_ids": [[3], [4, 5]]},
        (p.SequenceBias((((3,), -np.inf), ((4, 5), -np.inf))),),
    ),
    "the end is no bad word": ({"bad_words_ids": [[2]]}, ()),
    "min_length": ({"min_length": 6}, (p.MinLength(6, (2,)),)),
    "the prompt is as long": ({"min_length": 5}, ()),
    "no end to put off": (
        {"min_length": 6, "min_new_tokens": 3, "eos_token_id": None, "pad_token_id": 1},
        (),
    ),
    "min_new_tokens": ({"min_new_tokens": 3}, (p.MinNewTokens(3, (2,)),)),
    "forced_bos_token_id": ({"forced_bos_token_id": 4}, (p.ForcedBOS(4),)),
    "forced_eos_token_id": ({"forced_eos_token_id": 4}, (p.ForcedEOS((4,)),)),
    "forced ends": ({"forced_eos_token_id": [4, 5]}, (p.ForcedEOS((4, 5)),)),
    "remove_invalid_values": ({"remove_invalid_values": True}, (p.RemoveInvalid(),)),
    "decay": (
        {"exponential_decay_length_penalty": [3, 2]},
        (p.LengthDecay(3, 2.0, (2,)),),
    ),
    "suppress_tokens": ({"suppress_tokens": [3, 4]}, (p.Suppress((3, 4)),)),
    "begin_suppress_tokens": ({"begin_suppress_tokens": [3]}, (p.SuppressAtBegin((3,), 0),)),
    "begin after forced ones": (
        {"begin_suppress_tokens": [3], **FORCED},
        (p.SuppressAtBegin((3,), 7), p.ForceTokens(((6, 3), (7, 4)))),
    ),
    "renormalize_logits": ({"renormalize_logits": True}, (p.Renormalize(),)),
    "temperature": ({**SAMPLE, "temperature": 2}, (p.Temperature(2.0),)),
    "top_k": ({"do_sample": True, "top_k": 3}, (p.TopK(3),)),
    "top_k above the vocabulary": ({"do_sample": True}, (p.TopK(30),)),  # 50 by default
    "top_p": ({**SAMPLE, "top_p": 0.5}, (p.TopP(0.5),)),
    "min_p": ({**SAMPLE, "min_p": 0.1}, (p.MinP(0.1),)),
    "typical_p": ({**SAMPLE, "typical_p": 0.5}, (p.Typical(0.5),)),
    "epsilon_cutoff": ({**SAMPLE, "epsilon_cutoff": 0.1}, (p.Epsilon(0.1),)),
    "eta_cutoff": ({**SAMPLE, "eta_cutoff": 0.1}, (p.Eta(0.1),)),
    "beams keep two": (
        {"do_sample": True, "num_beams": 2, "top_k": 1, "top_p": 0.5},
        (p.TopK(2), p.TopP(0.5, 2)),
    ),
    "and one more than ends": (
        {**SAMPLE, "num_beams": 2, "typical_p": 0.5, "eos_token_id": [2, 3, 4]},
        (p.Typical(0.5, 4),),
    ),
    "neutral": (
        {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0},
        (),
    ),
    "none": ({"do_sample": True, "top_k": None, "top_p": None, "typical_p": None}, ()),
    "normalised twice": (
        {**SAMPLE, "renormalize_logits": True, "temperature": 0.5},
        (p.Renormalize(), p.Temperature(0.5), p.Renormalize()),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_options_make_processors(name: str) -> None:
    options, expected = PROCESSORS[name]
    assert plan(**options).processors == expected


def test_functions_of_the_caller_run_on_the_host() -> None:
    hooks = {"logits_processor": [function], "prefix_allowed_tokens_fn": function}
    found = plan(hooks=hooks, num_beams=4)
    assert found.processors == (p.PrefixAllowed(function, 4), p.UserDefined(function))
    assert found.needs_host
    assert plan(hooks=hooks).processors[0] == p.PrefixAllowed(function, 1)


def test_the_beginning_waits_for_a_forced_first_token() -> None:
    options = {"begin_suppress_tokens": [3], "forced_bos_token_id": 4}
    assert plan(1, **options).processors == (p.ForcedBOS(4), p.SuppressAtBegin((3,), 1))
    assert plan(2, **options).processors == (p.ForcedBOS(4), p.SuppressAtBegin((3,), 0))


def test_the_order_of_processors() -> None:
    """All at once, which no strategy takes, in the order of PROCESSORS; that of the reference."""
    options = {key: value for row in PROCESSORS.values() for key, value in row[0].items()}
    options = {**options, "do_sample": True, "top_k": 3, "top_p": 0.5, "typical_p": 0.5}
    options |= {"temperature": 0.5, "guidance_scale": 2, "bad_words_ids": [[3]], "min_length": 9}
    options |= {"forced_eos_token_id": 3, "eos_token_id": 2}
    hooks = Hooks(logits_processor=[function], prefix_allowed_tokens_fn=function)
    found = list(plan_processors(OPTIONS.replace(**options), MODEL, 5, hooks))
    kinds = [type(processor) for processor in found]
    kinds.pop(kinds.index(p.Renormalize))  # comes a second time, at the end
    kinds.pop(len(kinds) - 1 - kinds[::-1].index(p.SequenceBias))  # that of bad words
    assert tuple(kinds) == p.PROCESSORS


def test_the_recorded_order_of_the_reference() -> None:
    with np.load(GOLDEN / "processors.npz") as file:
        order = file["order"].tolist()
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.5}
    found = plan(3, do_sample=True, min_length=5, min_new_tokens=3, **options).processors
    endings = ("LogitsProcessor", "LengthLogitsProcessor", "LogitsWarper")
    for processor, name in zip(found, order, strict=True):
        assert name in [type(processor).__name__ + end for end in endings]
