# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens of the reference under several settings, alone and padded.

Used by make_golden.py, in an environment with transformers==4.37.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, OPTForCausalLM

PAD, BATCH, LENGTH, NEW_TOKENS = 1, 3, 7, 16
Arrays = dict[str, np.ndarray]


def tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    """Numpy inputs as torch tensors."""
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def generate(model: OPTForCausalLM, inputs: Arrays, settings: dict[str, Any]) -> Any:
    """`sequences` [B, T + new] of a greedy search, and the smallest lead of a chosen token."""
    plan = GenerationConfig(max_new_tokens=NEW_TOKENS, bos_token_id=2, pad_token_id=PAD, **settings)
    plan.return_dict_in_generate = plan.output_scores = True
    result = model.generate(**tensors(inputs), generation_config=plan)
    running = torch.ones(len(inputs["input_ids"]), dtype=torch.bool)
    margin, eos = float("inf"), torch.tensor(settings.get("eos_token_id") or [])
    prompt = inputs["input_ids"].shape[1]
    for step, scores in enumerate(result.scores):
        best = scores.topk(2).values  # [B, 2]
        margin = min([margin, *(best[:, 0] - best[:, 1])[running].tolist()])
        running &= ~torch.isin(result.sequences[:, prompt + step], eos)
    return result.sequences.numpy(), margin


def choose_eos(new: np.ndarray) -> list[int]:
    """Two tokens: with the first alone a row ends at step 2-8 and another runs at least 2 longer."""

    def ends(token: int) -> list[int]:
        hits = [np.flatnonzero(row == token) for row in new]
        return sorted(int(hit[0]) if len(hit) else NEW_TOKENS for hit in hits)

    good = [int(t) for t in np.unique(new) if 2 <= ends(t)[0] <= 8 and ends(t)[-1] > ends(t)[0] + 1]
    if not good:
        raise SystemExit(f"no token can serve as end of sequence in\n{new}; change the seed")
    first = max(good, key=lambda t: (sum(end < NEW_TOKENS for end in ends(t)), -t))
    others = [int(t) for t in np.unique(new) if t != first]
    return [first, min(others, key=lambda t: (ends(t)[0] < 2, ends(t)[0], t))]


def generations(model: OPTForCausalLM, rng: np.random.Generator) -> tuple[Arrays, dict[str, Any]]:
    """Greedy tokens of three prompts: alone, left-padded, right-padded, under several settings."""
    lengths = [3, LENGTH, 5]
    rows = [rng.integers(3, model.config.vocab_size, (1, length)) for length in lengths]
    left, right = np.full((BATCH, LENGTH), PAD), np.full((BATCH, LENGTH), PAD)
    for i, row in enumerate(rows):
        left[i, LENGTH - lengths[i] :], right[i, : lengths[i]] = row[0], row[0]
    left_inputs = {"input_ids": left, "attention_mask": (left != PAD).astype(np.int64)}
    right_inputs = {"input_ids": right, "attention_mask": (right != PAD).astype(np.int64)}
    free, _ = generate(model, left_inputs, {"eos_token_id": None})
    eos = choose_eos(free[:, LENGTH:])
    plans: dict[str, dict[str, Any]] = {
        "greedy": {"eos_token_id": None},
        "eos": {"eos_token_id": eos[:1]},
        "eos_list": {"eos_token_id": eos},
        "min_length": {"eos_token_id": eos[:1], "min_length": LENGTH + 6},
        "min_new_tokens": {"eos_token_id": eos[:1], "min_new_tokens": 10},
        "repetition_penalty": {"eos_token_id": None, "repetition_penalty": 1.8},
    }
    arrays: Arrays = {}
    report: dict[str, Any] = {}
    for name, settings in plans.items():
        key = f"generate/{name}"
        sequences, margin = generate(model, left_inputs, settings)
        arrays.update({f"{key}/left/{k}": v for k, v in left_inputs.items()})
        arrays[f"{key}/left/sequences"] = sequences
        alone = []
        for i, row in enumerate(rows):
            one, row_margin = generate(model, {"input_ids": row}, settings)
            arrays[f"{key}/alone/{i}/input_ids"] = row
            arrays[f"{key}/alone/{i}/sequences"] = one
            alone.append(one[0, lengths[i] :])
            margin = min(margin, row_margin)
        new = np.full((BATCH, max(map(len, alone))), PAD)  # [B, new]
        for i, tokens in enumerate(alone):
            new[i, : len(tokens)] = tokens
        arrays.update({f"{key}/right/{k}": v for k, v in right_inputs.items()})
        arrays[f"{key}/right/new_tokens"] = new
        if margin < 1e-3 or PAD in new[:, 0] or (PAD in new and name == "greedy"):
            raise SystemExit(f"{name}: margin {margin}, tokens\n{new}\nchange the seed")
        report[name] = {
            "settings": {"max_new_tokens": NEW_TOKENS, "pad_token_id": PAD, **settings},
            "smallest_margin": round(margin, 6),
            "left_rows_equal_alone": np.array_equal(sequences[:, LENGTH:], new),
        }
    return arrays, report
