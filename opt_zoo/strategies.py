# SPDX-License-Identifier: Apache-2.0
"""The strategies of `opt-zoo generate` by name: the options of `generate` that each stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opt_core.errors import InputError
from opt_core.generation.strategies import GenerationMode

#: What each strategy sets where the caller does not.
OPTIONS: Mapping[GenerationMode, Mapping[str, Any]] = {
    GenerationMode.GREEDY: {},
    GenerationMode.SAMPLE: {"do_sample": True},
    GenerationMode.BEAM: {"num_beams": 4},
    GenerationMode.BEAM_SAMPLE: {"num_beams": 4, "do_sample": True},
    GenerationMode.GROUP_BEAM: {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    GenerationMode.CONSTRAINED_BEAM: {"num_beams": 4},
    GenerationMode.CONTRASTIVE: {"penalty_alpha": 0.6, "top_k": 4},
    GenerationMode.ASSISTED: {},
    GenerationMode.PROMPT_LOOKUP: {"prompt_lookup_num_tokens": 10},
    GenerationMode.DOLA: {"dola_layers": "high"},
}


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options given as NAME=VALUE, the value in JSON, or a word as it is.

    Raises:
        InputError: a text without a name.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise InputError(f"--option {text!r}: expected NAME=VALUE, such as num_beams=4.")
        try:
            found[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[name.strip()] = value
    return found
