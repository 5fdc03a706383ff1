# SPDX-License-Identifier: Apache-2.0
"""The loop of beam search with a step that is no model, against the one with lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opt_core.generation.plan import DecodePlan
from opt_torch.cache import KVCache, LayerCache
from opt_torch.generation.beam import beam_search
from opt_torch.generation.state import Decoded, DecodeState, StepOutput
from tests.beams import CASES, LIMIT, PROMPTS, TABLE, Array, Stopper, check, gumbel, plan_for


def decode(plan: DecodePlan, noise: Array | None = None, watch: Any = None) -> Decoded:
    """Decodes the prompts with logits for each pair of tokens, of which the cache holds the first."""
    table, rows = torch.from_numpy(TABLE), plan.strategy.rows
    prompts = torch.from_numpy(PROMPTS).repeat_interleave(rows, dim=0)  # [rows, 2]
    room = torch.full((len(prompts), plan.max_new_tokens), plan.pad_token_id)
    tokens = torch.cat([prompts, room], dim=1)

    def cache_of(tokens: torch.Tensor) -> KVCache:
        return KVCache((LayerCache(tokens, tokens),))

    def step(tokens: torch.Tensor, cache: KVCache) -> StepOutput:
        return StepOutput(table[cache.layers[0].key, tokens], None, cache_of(tokens))

    state = DecodeState(
        tokens=tokens,
        mask=torch.ones_like(tokens),
        length=2,
        prompt_length=2,
        offset=0,
        limit=LIMIT,
        finished=torch.zeros(len(tokens), dtype=torch.bool),
        logits=table[prompts[:, 0], prompts[:, 1]],
        cache=cache_of(prompts[:, 1:]),
    )
    draw = None if noise is None else torch.from_numpy(noise).__getitem__
    return beam_search(plan, state, step, draw, watch)


@pytest.mark.parametrize("case", CASES)
def test_finds_what_the_search_with_lists_finds(case: str) -> None:
    plan = plan_for(case)
    noise = gumbel(plan)
    check(plan, decode(plan, noise), noise)


def test_who_watches_sees_the_beams_and_ends_those_of_one_prompt() -> None:
    plan, watch = plan_for("groups at once"), Stopper(step=2)
    watch.check(plan, decode(plan, watch=watch))
