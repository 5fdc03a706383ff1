# SPDX-License-Identifier: Apache-2.0
"""Random settings of `generate`, each told by its seed."""

from __future__ import annotations

from typing import Any

import numpy as np

NEW_TOKENS, PAD = 12, 1
FOR_ENDS = ("min_new_tokens", "exponential_decay_length_penalty")
#: The reference penalises the first beam alone, and does not reorder the guides of beams.
NOT_FOR_BEAMS = ("encoder_repetition_penalty", "guidance_scale")
FORBIDDING = (
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "no_repeat_ngram_size",
    "forced_eos_token_id",
    "min_new_tokens",
)


def random_options(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    """A strategy, ends and some processors."""
    strategy = str(rng.choice(["greedy", "beams", "groups", "contrastive", "constrained"]))
    options = {
        "max_new_tokens": NEW_TOKENS,
        "pad_token_id": PAD,
        **_strategy(strategy, rng, vocab),
    }
    ends = int(rng.choice([0, 1, 2, 5]))
    options["eos_token_id"] = _tokens(rng, vocab, ends) or None
    for name, values in _processors(rng, vocab).items():
        fits = not any(
            (
                name in NOT_FOR_BEAMS and strategy != "greedy",
                # What must come and must not come is decided by chance.
                name in FORBIDDING[:-1] and strategy == "constrained",
                # An end that is forbidden and made likelier is NaN there, and taken.
                name in FORBIDDING and "exponential_decay_length_penalty" in options,
                name in FOR_ENDS and not ends,
            )
        )
        if rng.random() < 0.2 and fits:
            options[name] = values
    if {"suppress_tokens", "forced_eos_token_id"} <= options.keys():
        forced = options["forced_eos_token_id"]
        options["suppress_tokens"] = [t for t in options["suppress_tokens"] if t != forced]
    return options


def _tokens(rng: np.random.Generator, vocab: int, count: int) -> list[int]:
    return rng.choice(np.arange(3, vocab), count, replace=False).tolist()


def _strategy(name: str, rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    if name == "greedy":
        return {}
    if name == "contrastive":
        return {
            "penalty_alpha": float(rng.choice([0.2, 0.6, 0.9])),
            "top_k": int(rng.integers(2, 7)),
            "low_memory": bool(rng.integers(2)),
        }
    groups = int(rng.integers(2, 4)) if name == "groups" else 1
    beams = groups * int(rng.integers(1 + (groups == 1), 4))
    options = {
        "num_beams": beams,
        "num_return_sequences": int(rng.integers(1, beams + 1)),
        "length_penalty": float(rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0])),
        "early_stopping": [False, True, "never"][int(rng.integers(3))],
    }
    if name == "groups":
        options |= {"num_beam_groups": groups, "diversity_penalty": float(rng.uniform(0.1, 2))}
    if name == "constrained":
        options["force_words_ids"] = [_tokens(rng, vocab, n) for n in rng.integers(1, 3, 2)]
    return options


def _processors(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    """A value for each option."""
    pairs = [_tokens(rng, vocab, 2) for _ in range(20)]
    return {
        "exponential_decay_length_penalty": [int(rng.integers(0, 6)), float(rng.uniform(1, 1.5))],
        "repetition_penalty": float(rng.uniform(0.7, 2)),
        "encoder_repetition_penalty": float(rng.uniform(0.5, 2)),
        "no_repeat_ngram_size": int(rng.integers(1, 4)),
        "bad_words_ids": [[token] for token in _tokens(rng, vocab, 20)] + pairs[:10],
        "sequence_bias": [[pair, float(rng.normal() * 4)] for pair in pairs],
        "min_new_tokens": int(rng.integers(2, NEW_TOKENS)),
        "forced_eos_token_id": _tokens(rng, vocab, 1)[0],
        "suppress_tokens": _tokens(rng, vocab, 20),
        "begin_suppress_tokens": _tokens(rng, vocab, 30),
        "renormalize_logits": True,
        "remove_invalid_values": True,
        "guidance_scale": float(rng.uniform(0.5, 3)),
    }
