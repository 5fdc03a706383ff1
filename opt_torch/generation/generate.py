# SPDX-License-Identifier: Apache-2.0
"""`generate`: from prompts and options to sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core.generation.config import GenerationConfig
from opt_core.generation.hooks import Hooks
from opt_core.generation.plan import DecodePlan, make_plan
from opt_core.generation.prompts import (
    GivenPrompts,
    Prompts,
    bucketed,
    check_noise,
    check_seed,
    read_prompts,
)
from opt_core.generation.strategies import (
    AssistedSearch,
    BeamSearch,
    ConstrainedBeamSearch,
    ContrastiveSearch,
    Search,
    Strategy,
)
from opt_core.generation.watching import Watch
from opt_torch.cache import KVCache
from opt_torch.generation.assisted import assisted_search
from opt_torch.generation.beam import beam_search
from opt_torch.generation.constrained import constrained_beam_search
from opt_torch.generation.contrastive import contrastive_search
from opt_torch.generation.decode import Noise, decode_step, first_state, prefill, step_forward
from opt_torch.generation.graphs import replayed
from opt_torch.generation.search import search
from opt_torch.generation.state import Decoded, Inputs, sent
from opt_torch.outputs import GenerateOutput

LOOPS: Mapping[type[Strategy], Callable[..., Decoded]] = {
    Search: search,
    BeamSearch: beam_search,
    ConstrainedBeamSearch: constrained_beam_search,
    ContrastiveSearch: contrastive_search,
    AssistedSearch: assisted_search,
}


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor | Sequence[Sequence[int]] | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    past_key_values: Any = None,
    negative_prompt_ids: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    seed: int | None = None,
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor | GenerateOutput:
    """Continues each prompt.

    Padding may stand on either side: each row gets the tokens that it gets alone.

    Args:
        model: an `OPTForCausalLM`.
        input_ids: [B, T]; None starts from the beginning-of-sequence token.
        generation_config: options instead of the model's own.
        attention_mask: [B, T], 1 at real tokens; by default told by the pad token.
        inputs_embeds: [B, T, E], instead of the ids, or of the ids given.
        past_key_values: a cache of the first tokens of `input_ids`, with a row for each prompt,
            whatever the number of beams.
        negative_prompt_ids: [B, any] what `guidance_scale` leads away from, with its mask
            `negative_prompt_attention_mask`; by default the last token of each prompt.
        seed: of the sampling; None draws a fresh one from PyTorch's global generator.
        noise: the sampling's Gumbel noise itself, [steps, rows, V].
        options: fields of `GenerationConfig` that override it, and objects of `Hooks`.

    Returns:
        [B x num_return_sequences, T + new tokens]: the prompts as given (none of embeddings alone),
        then the new tokens; rows that ended early are filled with the pad token. With
        `return_dict_in_generate`, a `GenerateOutput` of them and of what was asked for.

    Raises:
        InputError: options or prompts that do not fit each other or the model.
        UnsupportedError: an option that OPT models cannot have.
    """
    hooks = Hooks.taken_from(options)
    own = model.generation_config
    config = GenerationConfig.of_call(generation_config, own, model.config, options)
    past = None
    if past_key_values is not None:
        past = KVCache.from_pairs(past_key_values, model.device)
    embeds = None if inputs_embeds is None else torch.as_tensor(inputs_embeds, device=model.device)
    given = GivenPrompts(
        _array(input_ids),
        _array(attention_mask),
        embeds_shape=None if embeds is None else embeds.shape,
        past=None if past is None else past.shapes(waits=True),
        negative_ids=_array(negative_prompt_ids),
        negative_mask=_array(negative_prompt_attention_mask),
    )
    prompts = read_prompts(given, config, model.config)
    past = past if prompts.lengths.past else None  # an empty one is none
    plan = make_plan(config, model.config, prompts.lengths, hooks)
    positions = prompts.lengths.longest + plan.max_new_tokens - 1
    hooks.check_assistant(model, positions, from_ids=embeds is None and past is None)
    draw = _noise(plan, model, len(prompts.known) * plan.strategy.rows, seed, noise)
    wide, padded = plan, prompts
    if config.cache_implementation == "static" and not config.return_dict_in_generate:
        wide, padded = bucketed(plan, prompts)
    inputs = _inputs(wide, padded, embeds, past, plan.max_new_tokens, model.device)
    watch = Watch(
        config,
        hooks,
        plan,
        to_numpy=lambda tensor: tensor.cpu().numpy(),
        repeat=lambda tensor, repeats: tensor.repeat_interleave(repeats, dim=0),
    )
    watch.start(prompts.given, len(prompts.known))
    decoded = run(
        model, wide, inputs, draw, watch if watch.is_needed else None, hooks.assistant_model
    )
    watch.end()
    return _output(plan, prompts, decoded, config, watch)


def run(
    model: Any,
    plan: DecodePlan,
    inputs: Inputs,
    noise: Noise | None,
    watch: Watch | None,
    assistant: Any = None,
) -> Decoded:
    """Prefills and decodes."""
    state = first_state(plan, inputs, prefill(model, plan, inputs, watch))
    loop = LOOPS[type(plan.strategy)]
    if assistant is not None:
        own = (assistant, plan, inputs, None)
        loop = partial(loop, assistant=(prefill(*own).cache, decode_step(*own)))
    with replayed(step_forward(model, plan, watch), model, plan, watch) as forward:
        step = decode_step(model, plan, inputs, watch, forward)
        return loop(plan, state, step, noise, watch)


def _inputs(
    plan: DecodePlan,
    prompts: Prompts,
    embeds: Tensor | None,
    past: KVCache | None,
    limit: int,
    device: torch.device,
) -> Inputs:
    pads = plan.prompt_length - prompts.lengths.columns
    tokens, mask, known, order = (
        sent(x.astype(np.int64), device)
        for x in (prompts.tokens, prompts.mask, prompts.known, prompts.order)
    )
    if embeds is not None:
        embeds = torch.take_along_dim(embeds, order[:, :, None], dim=1)
        embeds = F.pad(embeds, (0, 0, pads, 0))
    if past is not None:
        past = past.with_capacity(plan.capacity, pads)
    return Inputs(tokens, mask, known, embeds, past, prompts.offset, limit)


def _output(
    plan: DecodePlan, prompts: Prompts, decoded: Decoded, config: GenerationConfig, watch: Watch
) -> Tensor | GenerateOutput:
    """The sequences, and what else was asked for."""
    sequences = decoded.tokens[:, : decoded.length]
    if prompts.given is not None:
        given = sent(prompts.given, sequences.device).to(sequences.dtype)
        sequences = torch.cat([given.repeat_interleave(plan.num_return_sequences, 0), sequences], 1)
    if not config.return_dict_in_generate:
        return sequences
    cache = decoded.cache
    if plan.is_guided and cache is not None:  # whose second half guides
        cache = cache.take(torch.arange(len(cache.layers[0].key) // 2, device=sequences.device))
    return GenerateOutput(
        sequences=sequences,
        sequences_scores=decoded.sequences_scores,
        beam_indices=decoded.beam_indices,
        past_key_values=cache,
        **watch.records,
    )


def _array(value: Any) -> np.ndarray | None:
    """Token ids or a mask as numpy has them."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _noise(
    plan: DecodePlan, model: Any, rows: int, seed: int | None, noise: Tensor | None
) -> Noise | None:
    """The Gumbel noise [rows, V] of each step; None where nothing is sampled."""
    seed = check_seed(seed, noise, plan.strategy.do_sample)
    if not plan.strategy.do_sample:
        return None
    shape = (rows, model.config.vocab_size)
    if noise is not None:
        noise = torch.as_tensor(noise, device=model.device)
        check_noise(noise.shape, (plan.max_new_tokens, *shape))
        return noise.__getitem__
    generator = torch.Generator(device=model.device)
    seed = int(torch.randint(2**62, ())) if seed is None else seed

    def draw(index: int) -> Tensor:
        seed_of_step = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
        generator.manual_seed(int(seed_of_step[0]))
        exponential = torch.empty(shape, device=model.device).exponential_(generator=generator)
        return -torch.log(exponential)

    return draw
