# SPDX-License-Identifier: Apache-2.0
"""What FlashAttention-2 is held against `eager` with: by a stand-in (tests/torch) and truly (tests/flash)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import opt_torch
from opt_core import OPTConfig
from opt_torch import OPTForCausalLM
from tests.cases import case
from tests.tolerances import TOLERANCES, assert_close

TOLERANCE = TOLERANCES["flash", "float32"]
FLASH = "flash_attention_2"
LENGTH = 7
MASKS = {
    "left": [[0, 0, 1, 1, 1, 1, 1], [1] * 7],
    "right": [[1, 1, 1, 1, 0, 0, 0], [1] * 7, [1, 0, 0, 0, 0, 0, 0]],
    "amid": [[1, 0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 1, 0]],
    "a row of pads": [[0] * 7, [0, 1, 1, 1, 1, 1, 1]],
    "none": [[1] * 7, [1] * 7],
}
#: Five texts in two rows, -1 at pads.
POSITIONS = [[0, 1, 2, 0, 1, 0, 1], [-1, 0, 1, -1, 0, 1, 2]]
NEW_TOKENS = 6
#: Every strategy, by the options that ask for it.
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "guidance": {"guidance_scale": 1.5},
    "sampling by seed": {"do_sample": True, "seed": 3, "top_p": 0.9},
    "sampling by noise": {"do_sample": True, "noise": True, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True, "seed": 1},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained": {"num_beams": 3, "force_words_ids": [[20, 21], [30]]},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
    "contrastive, one by one": {"penalty_alpha": 0.6, "top_k": 2, "low_memory": True},
    "assisted": {"assistant_model": "no_final_norm", "num_assistant_tokens": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2},
    "dola": {"dola_layers": (0, 1)},
}


def pair(name: str = "pre_norm", **options: Any) -> tuple[OPTForCausalLM, OPTForCausalLM]:
    """The same model with FlashAttention and in plain operations."""
    load = OPTForCausalLM.from_pretrained
    return tuple(
        load(case(name).folder, attn_implementation=kernel, **options)
        for kernel in (FLASH, "eager")
    )


def tokens(rows: int, vocab_size: int = 90, length: int = LENGTH) -> Tensor:
    return torch.randint(3, vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def labels(mask: Tensor, vocab_size: int = 90) -> Tensor:
    """Those of real tokens that follow real ones: what is predicted at a pad is of no use."""
    follows = torch.cat([mask[:, :1] * 0, mask[:, 1:] * mask[:, :-1]], dim=1)
    return tokens(len(mask), vocab_size, mask.shape[1]).masked_fill(follows == 0, -100)


def generated(model: OPTForCausalLM, strategy: str, where: str) -> list[list[int]]:
    """What a strategy makes of padded prompts; an assistant has the same attention as the model."""
    mask, options = torch.tensor(MASKS[where]), dict(STRATEGIES[strategy])
    if "noise" in options:
        shape = (NEW_TOKENS, len(mask), model.config.vocab_size)
        noise = np.random.default_rng(0).gumbel(size=shape).astype(np.float32)
        options["noise"] = torch.from_numpy(noise)
    if "assistant_model" in options:
        options["assistant_model"] = OPTForCausalLM.from_pretrained(
            case(options["assistant_model"]).folder, attn_implementation=model.attn_implementation
        )
    ids = tokens(len(mask)).masked_fill(mask == 0, model.config.pad_token_id)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, eos_token_id=None, **options
    ).tolist()


def near(found: Tensor, expected: Tensor, what: str) -> None:
    assert_close(found.detach().numpy(), expected.detach().numpy(), what, tolerance=TOLERANCE)


def same_gradients(ours: Any, plain: Any) -> None:
    """Each relative to its own largest number, or to a tenth of the largest of all.

    Some are nothing but rounding: all keys alike change no weight, and all logits alike no probability.
    """
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    floor = max(gradient.abs().max() for gradient in gradients.values())[None] / 10
    for name, parameter in ours.named_parameters():
        found, expected = parameter.grad.flatten(), gradients[name].flatten()
        near(torch.cat([found, floor]), torch.cat([expected, floor]), name)


def random_pair(
    heads: int, architecture: str = "OPTForCausalLM", num_heads: int = 2, **shape: Any
) -> tuple[Any, Any]:
    """A model of random weights, large enough that attention is far from uniform, in both ways."""
    config = OPTConfig(
        vocab_size=90,
        hidden_size=num_heads * heads,
        num_attention_heads=num_heads,
        num_hidden_layers=2,
        ffn_dim=32,
        max_position_embeddings=160,
        init_std=0.3 / heads**0.25,
        dropout=0.0,
        num_labels=3,
        **{"word_embed_proj_dim": num_heads * heads, **shape},
    )
    kind = getattr(opt_torch, architecture)
    torch.manual_seed(0)
    ours, plain = (kind(config, attn_implementation=kernel).eval() for kernel in (FLASH, "eager"))
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def losses_with_pads(ours: Any, plain: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Losses of rows padded on the left with both attentions: as given, and without what pads predict.

    Of tokens the label of the first real one is what the last pad predicts; of answers the softmax runs
    over all columns, whose logits at pads are hidden by hand.
    """
    mask = torch.tensor(MASKS["left"])
    if isinstance(ours, OPTForCausalLM):
        given = tokens(2).masked_fill(mask == 0, -100)
        return tuple(
            tuple(m(tokens(2), attention_mask=mask, labels=wanted).loss for m in (ours, plain))
            for wanted in (given, labels(mask))
        )
    spans = torch.tensor([[4, 1], [6, 5]])  # of each row's start, and of its end
    given, hidden = [], []
    for model in (ours, plain):
        start, end = {"start_positions": spans[0]}, {"end_positions": spans[1]}
        output = model(tokens(2), attention_mask=mask, **start, **end)
        given.append(output.loss)
        logits = torch.stack([output.start_logits, output.end_logits])  # [2, B, T]
        logits = logits.masked_fill(mask == 0, -torch.inf).flatten(0, 1)
        hidden.append(F.cross_entropy(logits, spans.flatten()))
    return tuple(given), tuple(hidden)
