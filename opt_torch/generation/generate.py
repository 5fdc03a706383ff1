# SPDX-License-Identifier: Apache-2.0
"""`generate`: from prompts and options to sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opt_core.generation.config import GenerationConfig
from opt_core.generation.plan import DecodePlan, GenerationMode, make_plan
from opt_core.generation.prompts import (
    check_noise,
    check_prompt_shape,
    check_prompts,
    check_seed,
    infers_mask,
    start_of_text,
)
from opt_torch.generation.decode import Noise, decode, decode_step, prefill
from opt_torch.generation.state import DecodeState


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor | Sequence[Sequence[int]] | None = None,
    *,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    seed: int | None = None,
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Continues each prompt, greedily or by sampling.

    Padding may stand on either side: each row gets the tokens that it gets alone.

    Args:
        model: an `OPTForCausalLM`.
        input_ids: [B, T]; None starts from the beginning-of-sequence token.
        attention_mask: [B, T], 1 at real tokens; by default told by the pad token.
        generation_config: options instead of the model's own.
        seed: of the sampling; None draws a fresh one from PyTorch's global generator.
        noise: the sampling's Gumbel noise itself, [steps, B x num_return_sequences, V].
        options: fields of `GenerationConfig` that override it.

    Returns:
        [B x num_return_sequences, T + new tokens]: the prompts as given, then the new tokens; rows
        that ended early are filled with the pad token.

    Raises:
        InputError: options or prompts that do not fit each other or the model.
        UnsupportedError: an option that this release does not have.
    """
    config = (generation_config or model.generation_config).replace(**options)
    input_ids = _prompts(input_ids, config, model.device)
    plan = make_plan(config, model.config, input_ids.shape[1])
    if attention_mask is None and infers_mask(config):
        attention_mask = (input_ids != config.pad_token_id).long()  # type: ignore[attr-defined]
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    attention_mask = torch.as_tensor(attention_mask, device=model.device)
    check_prompts(input_ids.cpu().numpy(), attention_mask.cpu().numpy(), model.config)
    attention_mask = attention_mask.long()

    input_ids = input_ids.repeat_interleave(plan.num_return_sequences, dim=0)
    attention_mask = attention_mask.repeat_interleave(plan.num_return_sequences, dim=0)
    tokens, mask = align_right(input_ids, attention_mask)
    new_tokens = run(model, plan, tokens, mask, _noise(plan, model, len(tokens), seed, noise))
    return torch.cat([input_ids, new_tokens], dim=1)


def run(model: Any, plan: DecodePlan, tokens: Tensor, mask: Tensor, noise: Noise | None) -> Tensor:
    """Prefills and decodes: prompts [B, T], aligned to the right -> new tokens [B, at most new]."""
    batch, prompt_length = tokens.shape
    room = torch.ones((batch, plan.max_new_tokens), dtype=mask.dtype, device=mask.device)
    full_mask = torch.cat([mask, room], dim=1)  # [B, S]
    padded = not bool(mask.all())  # without padding no mask is needed, and the kernel is faster
    logits, cache = prefill(model, tokens, mask if padded else None, plan)
    state = DecodeState(
        tokens=torch.cat([tokens, torch.full_like(room, plan.pad_token_id)], dim=1),
        mask=full_mask,
        length=prompt_length,
        prompt_length=prompt_length,
        finished=torch.zeros(batch, dtype=torch.bool, device=tokens.device),
        logits=logits,
        cache=cache,
    )
    step_mask = full_mask[:, : plan.capacity] if padded else None
    step = decode_step(model, step_mask, mask.sum(dim=1), prompt_length)
    return decode(plan, state, step, noise)


def align_right(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves each row's real tokens to its right end, in order, and its pads to the left."""
    order = torch.argsort(mask, dim=1, stable=True)  # [B, T]
    return tokens.gather(1, order), mask.gather(1, order)


def _prompts(input_ids: Any, config: GenerationConfig, device: torch.device) -> Tensor:
    if input_ids is None:
        input_ids = start_of_text(config)
    tokens = torch.as_tensor(input_ids, device=device)
    check_prompt_shape(tokens.shape, str(tokens.dtype))
    return tokens.long()


def _noise(
    plan: DecodePlan, model: Any, rows: int, seed: int | None, noise: Tensor | None
) -> Noise | None:
    """The Gumbel noise [rows, V] of each step; None where nothing is sampled."""
    check_seed(seed, noise)
    if plan.mode is GenerationMode.GREEDY:
        return None
    shape = (rows, model.config.vocab_size)
    if noise is not None:
        noise = torch.as_tensor(noise, device=model.device)
        check_noise(noise.shape, (plan.max_new_tokens, *shape))
        return noise.__getitem__
    generator = torch.Generator(device=model.device)
    generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)

    def draw(index: int) -> Tensor:
        exponential = torch.empty(shape, device=model.device).exponential_(generator=generator)
        return -torch.log(exponential)

    return draw
