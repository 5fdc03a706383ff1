# SPDX-License-Identifier: Apache-2.0
"""Scores before and after each logits processor of the reference.

Used by make_golden.py, in an environment with transformers==4.37.2.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, OPTForCausalLM
from transformers.generation import logits_process as hf

PROMPT, VOCABULARY = 7, 31
ROWS = [
    [4, 5, 6, 7, 4, 5, 6, 8, 4],
    [9, 9, 9, 9, 9, 9, 9, 9, 9],
    [10, 11, 12, 10, 11, 13, 10, 11, 12],
    [14, 15, 16, 17, 18, 19, 20, 21, 22],
]
# One token, some that rows may complete, one as long as a row and one longer.
BIASES: list[tuple[list[int], float]] = [
    ([3], 1.5),
    ([4, 5], -2.25),
    ([4, 6], 0.75),
    ([9, 9, 9], 3.0),
    ([9, 5], 0.5),
    ([*ROWS[3][1:], 23], 4.0),
    ([*ROWS[3], 24], 5.0),
]
WORDS = [[2], [5], [4, 5], [9, 9, 9], [30, 29]]

# key -> (class, its arguments); several settings of one class are told apart by the number
PROCESSORS: dict[str, tuple[type, dict[str, Any]]] = {
    "guidance/0": (hf.UnbatchedClassifierFreeGuidanceLogitsProcessor, {"guidance_scale": 1.5}),
    "guidance/1": (hf.UnbatchedClassifierFreeGuidanceLogitsProcessor, {"guidance_scale": -0.5}),
    "sequence_bias/0": (hf.SequenceBiasLogitsProcessor, {"sequence_bias": BIASES}),
    "bad_words/0": (hf.NoBadWordsLogitsProcessor, {"bad_words_ids": WORDS, "eos_token_id": 2}),
    "diversity/0": (
        hf.HammingDiversityLogitsProcessor,
        {"diversity_penalty": 0.75, "num_beams": 6, "num_beam_groups": 3},
    ),
    "prompt_repetition_penalty/0": (hf.EncoderRepetitionPenaltyLogitsProcessor, {"penalty": 1.3}),
    "prompt_repetition_penalty/1": (hf.EncoderRepetitionPenaltyLogitsProcessor, {"penalty": 0.6}),
    "repetition_penalty/0": (hf.RepetitionPenaltyLogitsProcessor, {"penalty": 1.3}),
    "repetition_penalty/1": (hf.RepetitionPenaltyLogitsProcessor, {"penalty": 0.6}),
    **{
        f"no_repeat_ngram/{size}": (hf.NoRepeatNGramLogitsProcessor, {"ngram_size": size})
        for size in (1, 2, 3, 9, 10, 12)
    },
    "min_length/0": (hf.MinLengthLogitsProcessor, {"min_length": 12, "eos_token_id": 2}),
    "min_length/1": (hf.MinLengthLogitsProcessor, {"min_length": 12, "eos_token_id": [2, 5]}),
    "min_length/2": (hf.MinLengthLogitsProcessor, {"min_length": 9, "eos_token_id": 2}),
    "min_new_tokens/0": (
        hf.MinNewTokensLengthLogitsProcessor,
        {"prompt_length_to_skip": PROMPT, "min_new_tokens": 4, "eos_token_id": 2},
    ),
    "min_new_tokens/1": (
        hf.MinNewTokensLengthLogitsProcessor,
        {"prompt_length_to_skip": PROMPT, "min_new_tokens": 4, "eos_token_id": [2, 5]},
    ),
    "min_new_tokens/2": (
        hf.MinNewTokensLengthLogitsProcessor,
        {"prompt_length_to_skip": PROMPT, "min_new_tokens": 2, "eos_token_id": 2},
    ),
    "prefix_allowed/0": (hf.PrefixConstrainedLogitsProcessor, {"num_beams": 2}),
    "forced_bos/0": (hf.ForcedBOSTokenLogitsProcessor, {"bos_token_id": 6}),
    "forced_eos/0": (hf.ForcedEOSTokenLogitsProcessor, {"max_length": 10, "eos_token_id": 2}),
    "forced_eos/1": (hf.ForcedEOSTokenLogitsProcessor, {"max_length": 10, "eos_token_id": [2, 5]}),
    "forced_eos/2": (hf.ForcedEOSTokenLogitsProcessor, {"max_length": 11, "eos_token_id": 2}),
    "remove_invalid/0": (hf.InfNanRemoveLogitsProcessor, {}),
    **{
        f"length_decay/{i}": (
            hf.ExponentialDecayLengthPenalty,
            {
                "exponential_decay_length_penalty": [start, factor],
                "eos_token_id": [2, 5],
                "input_ids_seq_length": PROMPT,
            },
        )
        for i, (start, factor) in enumerate([(0, 1.7), (1, 0.4), (2, 1.7)])
    },
    "suppress/0": (hf.SuppressTokensLogitsProcessor, {"suppress_tokens": [3, 30]}),
    "suppress_at_begin/0": (
        hf.SuppressTokensAtBeginLogitsProcessor,
        {"begin_suppress_tokens": [3, 30], "begin_index": 9},
    ),
    "suppress_at_begin/1": (
        hf.SuppressTokensAtBeginLogitsProcessor,
        {"begin_suppress_tokens": [3, 30], "begin_index": 8},
    ),
    "force_tokens/0": (hf.ForceTokensLogitsProcessor, {"force_token_map": [[8, 3], [9, 4]]}),
    "force_tokens/1": (hf.ForceTokensLogitsProcessor, {"force_token_map": [[8, 3], [10, 4]]}),
    "temperature/0": (hf.TemperatureLogitsWarper, {"temperature": 0.7}),
    "temperature/1": (hf.TemperatureLogitsWarper, {"temperature": 1.9}),
    "top_k/0": (hf.TopKLogitsWarper, {"top_k": 1}),
    "top_k/1": (hf.TopKLogitsWarper, {"top_k": 5}),
    "top_k/2": (hf.TopKLogitsWarper, {"top_k": 500}),
    "top_k/3": (hf.TopKLogitsWarper, {"top_k": 2, "min_tokens_to_keep": 4}),
    "top_p/0": (hf.TopPLogitsWarper, {"top_p": 0.05}),
    "top_p/1": (hf.TopPLogitsWarper, {"top_p": 0.5}),
    "top_p/2": (hf.TopPLogitsWarper, {"top_p": 0.95}),
    "top_p/3": (hf.TopPLogitsWarper, {"top_p": 0.1, "min_tokens_to_keep": 6}),
    "typical/0": (hf.TypicalLogitsWarper, {"mass": 0.05}),
    "typical/1": (hf.TypicalLogitsWarper, {"mass": 0.5}),
    "typical/2": (hf.TypicalLogitsWarper, {"mass": 0.95}),
    "typical/3": (hf.TypicalLogitsWarper, {"mass": 0.1, "min_tokens_to_keep": 6}),
    "epsilon/0": (hf.EpsilonLogitsWarper, {"epsilon": 0.02}),
    "epsilon/1": (hf.EpsilonLogitsWarper, {"epsilon": 0.99}),
    "epsilon/2": (hf.EpsilonLogitsWarper, {"epsilon": 0.9, "min_tokens_to_keep": 4}),
    "eta/0": (hf.EtaLogitsWarper, {"epsilon": 0.02}),
    "eta/1": (hf.EtaLogitsWarper, {"epsilon": 0.99}),
    "eta/2": (hf.EtaLogitsWarper, {"epsilon": 0.9, "min_tokens_to_keep": 4}),
    "renormalize/0": (hf.LogitNormalization, {}),
}
#: Those that are recorded with scores some of which are -inf already, as processors leave them.
AFTER_OTHERS = ("temperature", "top_k", "top_p", "typical", "epsilon", "eta", "renormalize")


def allowed(prompt: int, tokens: Any) -> list[int]:
    """The `prefix_allowed_tokens_fn` of prefix_allowed/0."""
    return [(prompt + int(tokens[-1]) + i) % VOCABULARY for i in range(3)]


def record_processors(path: Path, model: OPTForCausalLM) -> None:
    """Write scores before and after each processor, and the order that generate() puts them in.

    `input_ids` [4, 9], the first 7 of them a prompt; `scores` [4, 31]; `tied_scores` are the same in
    steps of a half, for top_k; `forbidden_scores` are -inf at some places, and `invalid_scores`
    contain NaN and infinities. `unconditional` [4, 31] are for guidance; `chosen` [2, 4] are tokens
    of two prompts that two groups of two beams chose before the third group, whose rows these are.
    """
    rng = np.random.default_rng(2024)
    scores = (3.0 * rng.standard_normal((len(ROWS), VOCABULARY))).astype(np.float32)
    arrays = {
        "input_ids": np.array(ROWS),
        "scores": scores,
        "tied_scores": np.round(scores * 2) / 2,
        "forbidden_scores": np.where(rng.random(scores.shape) < 0.4, -np.inf, scores),
        "invalid_scores": scores.copy(),
        "unconditional": (3.0 * rng.standard_normal(scores.shape)).astype(np.float32),
        "chosen": rng.integers(0, 4, (2, 4)),
    }
    arrays["invalid_scores"][:, 3:6] = (np.nan, np.inf, -np.inf)
    for key, (kind, settings) in PROCESSORS.items():
        arrays[f"{key}/settings"] = np.array(json.dumps(settings))
        name = key.split("/")[0]
        starts = {"": "scores"}
        if name == "top_k":
            starts["tied_"] = "tied_scores"
        if name == "remove_invalid":
            starts["invalid_"] = "invalid_scores"
        if name in AFTER_OTHERS:
            starts["forbidden_"] = "forbidden_scores"
        for prefix, start in starts.items():
            arrays[f"{key}/{prefix}result"] = processed(kind, settings, arrays, arrays[start])
    short = torch.tensor(ROWS)[:, :1]
    start = torch.from_numpy(scores.copy())
    arrays["forced_bos/0/first_result"] = hf.ForcedBOSTokenLogitsProcessor(6)(short, start).numpy()
    arrays["order"] = np.array(processor_order(model))
    np.savez_compressed(path, **arrays)


def processed(
    kind: type, settings: dict[str, Any], arrays: dict[str, np.ndarray], scores: np.ndarray
) -> np.ndarray:
    """The scores after a processor of these settings."""
    ids, given, call = torch.tensor(ROWS), dict(settings), {}
    if kind is hf.UnbatchedClassifierFreeGuidanceLogitsProcessor:
        logits = torch.from_numpy(arrays["unconditional"])[:, None]
        given["model"] = lambda *args, **kwargs: Output(logits=logits)
    if kind is hf.SequenceBiasLogitsProcessor:
        given["sequence_bias"] = {tuple(sequence): bias for sequence, bias in BIASES}
    if kind is hf.EncoderRepetitionPenaltyLogitsProcessor:
        given["encoder_input_ids"] = ids[:, :PROMPT]
    if kind is hf.PrefixConstrainedLogitsProcessor:
        given["prefix_allowed_tokens_fn"] = allowed
    if kind is hf.ExponentialDecayLengthPenalty:
        given["exponential_decay_length_penalty"] = tuple(given["exponential_decay_length_penalty"])
    if kind is hf.HammingDiversityLogitsProcessor:
        later = np.zeros((2, 2), np.int64)  # the third group has not chosen yet
        current = np.concatenate([arrays["chosen"], later], axis=1)
        call = {"current_tokens": torch.from_numpy(current.reshape(-1)), "beam_group_idx": 2}
    return kind(**given)(ids, torch.from_numpy(scores.copy()), **call).numpy()


class Output(SimpleNamespace):
    """What guidance reads of a model's output."""

    def get(self, name: str, default: Any) -> Any:
        return default


def processor_order(model: OPTForCausalLM) -> list[str]:
    """Class names in the order in which generate() applies them when sampling."""
    config = GenerationConfig(
        do_sample=True,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        repetition_penalty=1.5,
        min_length=5,
        min_new_tokens=3,
        eos_token_id=[2],
    )
    processors = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=4,
        encoder_input_ids=torch.ones((1, 4), dtype=torch.long),
        prefix_allowed_tokens_fn=None,
        logits_processor=hf.LogitsProcessorList(),
    )
    return [type(p).__name__ for p in [*processors, *model._get_logits_warper(config)]]
