# SPDX-License-Identifier: Apache-2.0
"""The static cache: the same tokens, and one compiled program for all lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from opt_core import OPTConfig
from opt_torch import OPTForCausalLM

CONFIG = OPTConfig(
    vocab_size=60,
    hidden_size=16,
    num_attention_heads=2,
    num_hidden_layers=2,
    ffn_dim=32,
    max_position_embeddings=80,
    word_embed_proj_dim=8,
)
STATIC = {"cache_implementation": "static"}


@pytest.fixture
def model() -> OPTForCausalLM:
    torch.manual_seed(0)
    model = OPTForCausalLM(CONFIG.replace(init_std=0.3))
    return model.eval()


def prompts(length: int) -> torch.Tensor:
    ids = torch.arange(2 * length).reshape(2, length) % 50 + 5
    ids[0, 0] = CONFIG.pad_token_id
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "seed": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"penalty_alpha": 0.6, "top_k": 3},
        {"penalty_alpha": 0.6, "top_k": 3, "low_memory": True},
        {"guidance_scale": 1.5},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_the_tokens_are_the_same(model: OPTForCausalLM, options: dict[str, Any]) -> None:
    for length in (3, 7):
        plain = model.generate(prompts(length), max_new_tokens=9, **options)
        static = model.generate(prompts(length), max_new_tokens=9, **options, **STATIC)
        assert static.tolist() == plain.tolist()


def test_embeddings_and_a_cache(model: OPTForCausalLM) -> None:
    ids = prompts(6)[1:]
    plain = model.generate(ids, max_new_tokens=9)
    embeds = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embeds, max_new_tokens=9, **STATIC)
    assert found.tolist() == plain[:, 6:].tolist()
    past = model(ids[:, :4]).past_key_values
    again = model.generate(ids, past_key_values=past, max_new_tokens=9, **STATIC)
    assert again.tolist() == plain.tolist()


def test_one_program_serves_all_lengths(model: OPTForCausalLM) -> None:
    """One graph for prompts and one for steps; neither another length nor more steps add any."""
    torch._dynamo.reset()
    plain = [model.generate(prompts(n), max_new_tokens=new) for n, new in ((3, 4), (9, 7), (20, 2))]
    counter = CompileCounter()
    model.model.compile(backend=counter, fullgraph=True)
    found = [
        model.generate(prompts(n), max_new_tokens=new, **STATIC)
        for n, new in ((3, 4), (9, 7), (20, 2))
    ]
    assert [x.tolist() for x in found] == [x.tolist() for x in plain]
    assert counter.frame_count == 2
