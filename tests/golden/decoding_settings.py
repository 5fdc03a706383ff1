# SPDX-License-Identifier: Apache-2.0
"""The settings of make_decoding.py: strategies, and options that change what they choose.

Each is a function of what the strategy finds without it, so that it forbids, forces or ends with tokens
that would have come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Free:
    """The new tokens of three rows where nothing is forbidden and nothing ends, best beams first."""

    rows: list[list[int]]
    eos: list[int]  # two tokens that appear in mid-row
    other: int  # any token


@dataclass(frozen=True)
class Setting:
    """What is recorded under one name.

    Attributes:
        strategy: options that say how tokens are searched for.
        options: further ones.
        acts: whether the options must change the tokens of a row.
        scores: whether the scores of the first steps are recorded too.
        prompts: "rows", or "bos" for the beginning-of-sequence token alone.
        negative: whether there are negative prompts.
        prefix: the allowed tokens are those of the last token's parity.
    """

    strategy: Mapping[str, Any]
    options: Callable[[Free], dict[str, Any]] = lambda free: {}
    acts: bool = True
    scores: bool = False
    prompts: str = "rows"
    negative: bool = False
    prefix: bool = False


GREEDY: dict[str, Any] = {}
BEAMS = {"num_beams": 3}
GROUPS = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.5}
CONTRASTIVE = {"penalty_alpha": 0.6, "top_k": 4}


def _second_tokens(free: Free) -> list[int]:
    return [row[1] for row in free.rows]


def _processors(strategy: dict[str, Any], name: str) -> dict[str, Setting]:
    """One setting for each processor, and several at once."""
    options: dict[str, Callable[[Free], dict[str, Any]]] = {
        "no_repeat_ngram": lambda free: {"no_repeat_ngram_size": 1},
        "bad_words": lambda free: {
            "bad_words_ids": [free.rows[0][:2], free.rows[1][1:4], [free.rows[2][0]]]
        },
        "sequence_bias": lambda free: {
            "sequence_bias": [
                [[free.rows[0][0]], -4.0],
                [free.rows[1][:2], -3.5],
                [free.rows[2][:3], -9.0],
            ]
        },
        "repetition_penalty": lambda free: {"repetition_penalty": 1.8},
        "encoder_repetition_penalty": lambda free: {"encoder_repetition_penalty": 0.6},
        "min_new_tokens": lambda free: {"eos_token_id": free.eos, "min_new_tokens": 6},
        "forced_eos": lambda free: {"forced_eos_token_id": free.eos[0]},
        "suppress": lambda free: {"suppress_tokens": _second_tokens(free)},
        "begin_suppress": lambda free: {"begin_suppress_tokens": [row[0] for row in free.rows]},
        "decay": lambda free: {
            "eos_token_id": free.eos[:1],
            "exponential_decay_length_penalty": [2, 1.3],
        },
        "several": lambda free: {
            "eos_token_id": free.eos,
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "suppress_tokens": _second_tokens(free),
            "min_new_tokens": 4,
            "forced_eos_token_id": free.eos,
            "remove_invalid_values": True,
            "renormalize_logits": True,
        },
    }
    if strategy is BEAMS:  # of which the reference penalises the first alone
        del options["encoder_repetition_penalty"]
    return {f"{name}/{key}": Setting(strategy, value) for key, value in options.items()}


def _ends(strategy: dict[str, Any], **options: Any) -> Setting:
    return Setting(strategy, lambda free: {"eos_token_id": free.eos[:1], **options})


SETTINGS: dict[str, Setting] = {
    "greedy/plain": Setting(GREEDY, acts=False, scores=True),
    **_processors(GREEDY, "greedy"),
    "greedy/prefix": Setting(GREEDY, prefix=True),
    "greedy/forced_decoder_ids": Setting(
        GREEDY, lambda free: {"forced_decoder_ids": [[8, free.rows[0][0]], [9, free.rows[1][0]]]}
    ),
    "greedy/forced_bos": Setting(
        GREEDY, lambda free: {"forced_bos_token_id": free.other}, prompts="bos"
    ),
    "greedy/guidance": Setting(GREEDY, lambda free: {"guidance_scale": 1.7}, scores=True),
    "greedy/negative": Setting(GREEDY, lambda free: {"guidance_scale": 2.5}, negative=True),
    "beam/plain": Setting(BEAMS, acts=False, scores=True),
    "beam/eos": _ends(BEAMS),
    "beam/several_eos": Setting(BEAMS, lambda free: {"eos_token_id": free.eos}),
    "beam/two": _ends({"num_beams": 2}, num_return_sequences=2),
    "beam/four": _ends({"num_beams": 4}, num_return_sequences=3),
    "beam/early": _ends(BEAMS, early_stopping=True, num_return_sequences=2),
    "beam/never": _ends(BEAMS, early_stopping="never", length_penalty=0.4),
    "beam/never_long": _ends(BEAMS, early_stopping="never", length_penalty=2.0),
    "beam/short": _ends(BEAMS, length_penalty=-1.0, num_return_sequences=3),
    "beam/long": _ends(BEAMS, length_penalty=2.5, num_return_sequences=3),
    **_processors(BEAMS, "beam"),
    "beam/prefix": Setting(BEAMS, prefix=True),
    "beam/forced_bos": Setting(
        BEAMS, lambda free: {"forced_bos_token_id": free.other}, prompts="bos"
    ),
    "group/plain": Setting({**GROUPS, "num_return_sequences": 4}, acts=False, scores=True),
    "group/eos": _ends(GROUPS, num_return_sequences=2),
    "group/early": _ends(GROUPS, early_stopping=True, num_return_sequences=4),
    "group/three": _ends({"num_beams": 3, "num_beam_groups": 3, "diversity_penalty": 0.7}),
    "group/several": Setting(
        GROUPS,
        lambda free: {
            "eos_token_id": free.eos,
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "bad_words_ids": [[free.rows[0][0]], free.rows[1][:2]],
        },
    ),
    "contrastive/plain": Setting(CONTRASTIVE, acts=False, scores=True),
    "contrastive/eos": Setting(CONTRASTIVE, lambda free: {"eos_token_id": free.eos}),
    "contrastive/weak": Setting({"penalty_alpha": 0.2, "top_k": 6}, acts=False),
    "contrastive/low_memory": Setting({**CONTRASTIVE, "low_memory": True}, acts=False),
    "contrastive/several": Setting(
        CONTRASTIVE,
        lambda free: {
            "eos_token_id": free.eos,
            "repetition_penalty": 1.5,
            "no_repeat_ngram_size": 2,
            "suppress_tokens": _second_tokens(free),
        },
    ),
}
