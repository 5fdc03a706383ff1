# SPDX-License-Identifier: Apache-2.0
"""Golden files beside the models: activation functions and logits processors.

Used by make_golden.py, in an environment with transformers==4.37.2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, OPTForCausalLM
from transformers.activations import ACT2FN
from transformers.generation import logits_process as hf

# key -> (class, its arguments); several settings of one class are told apart by the number
PROCESSORS: dict[str, tuple[type, dict[str, Any]]] = {
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
    "repetition_penalty/0": (hf.RepetitionPenaltyLogitsProcessor, {"penalty": 1.3}),
    "repetition_penalty/1": (hf.RepetitionPenaltyLogitsProcessor, {"penalty": 0.6}),
    "min_length/0": (hf.MinLengthLogitsProcessor, {"min_length": 12, "eos_token_id": 2}),
    "min_length/1": (hf.MinLengthLogitsProcessor, {"min_length": 12, "eos_token_id": [2, 5]}),
    "min_length/2": (hf.MinLengthLogitsProcessor, {"min_length": 9, "eos_token_id": 2}),
    "min_new_tokens/0": (
        hf.MinNewTokensLengthLogitsProcessor,
        {"prompt_length_to_skip": 7, "min_new_tokens": 4, "eos_token_id": 2},
    ),
    "min_new_tokens/1": (
        hf.MinNewTokensLengthLogitsProcessor,
        {"prompt_length_to_skip": 7, "min_new_tokens": 4, "eos_token_id": [2, 5]},
    ),
    "min_new_tokens/2": (
        hf.MinNewTokensLengthLogitsProcessor,
        {"prompt_length_to_skip": 7, "min_new_tokens": 2, "eos_token_id": 2},
    ),
}


def record_activations(path: Path) -> None:
    """Write every activation of the reference's table on a grid: `x` and one key per name."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float32)
    values = {name: ACT2FN[name](x).numpy() for name in sorted(ACT2FN)}
    np.savez_compressed(path, x=x.numpy(), **values)


def record_processors(path: Path, model: OPTForCausalLM) -> None:
    """Write scores before and after each processor, and the order that generate() puts them in.

    `input_ids` [4, 9]; `scores` [4, 31]; `tied_scores` are the same in steps of a half, for top_k.
    """
    rng = np.random.default_rng(2024)
    ids = rng.integers(3, 31, (4, 9))
    scores = (3.0 * rng.standard_normal((4, 31))).astype(np.float32)
    tied = np.round(scores * 2) / 2
    arrays = {"input_ids": ids, "scores": scores, "tied_scores": tied}
    for key, (kind, settings) in PROCESSORS.items():
        arrays[f"{key}/settings"] = np.array(json.dumps(settings))
        process = kind(**settings)
        for prefix, start in {"": scores, "tied_": tied}.items():
            if prefix == "" or kind is hf.TopKLogitsWarper:
                result = process(torch.from_numpy(ids), torch.from_numpy(start.copy()))
                arrays[f"{key}/{prefix}result"] = result.numpy()
    arrays["order"] = np.array(processor_order(model))
    np.savez_compressed(path, **arrays)


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
