# SPDX-License-Identifier: Apache-2.0
"""`generate`: from prompts and options to sequences."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from opt_core.errors import InputError, UnsupportedError
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
from opt_flax.cache import KVCache
from opt_flax.generation.assisted import assisted_search
from opt_flax.generation.beam import beam_search
from opt_flax.generation.constrained import constrained_beam_search
from opt_flax.generation.contrastive import contrastive_search
from opt_flax.generation.decode import Noise, decode_step, first_state, prefill
from opt_flax.generation.programs import programs_of, run_compiled, within_program
from opt_flax.generation.search import search
from opt_flax.generation.state import Decoded, Inputs
from opt_flax.outputs import GenerateOutput
from opt_flax.parts import to_array

LOOPS: Mapping[type[Strategy], Callable[..., Decoded]] = {
    Search: search,
    BeamSearch: beam_search,
    ConstrainedBeamSearch: constrained_beam_search,
    ContrastiveSearch: contrastive_search,
    AssistedSearch: assisted_search,
}


def generate(
    model: Any,
    input_ids: Any = None,
    generation_config: GenerationConfig | None = None,
    *,
    attention_mask: Any = None,
    inputs_embeds: Any = None,
    past_key_values: Any = None,
    negative_prompt_ids: Any = None,
    negative_prompt_attention_mask: Any = None,
    seed: int | None = None,
    noise: Any = None,
    params: Mapping[str, Any] | None = None,
    prng_key: Array | None = None,
    **options: Any,
) -> GenerateOutput:
    """Continues each prompt.

    Padding may stand on either side: each row gets the tokens that it gets alone. The first call
    with a plan compiles; those that follow reuse it, for lengths up to the next multiple of
    `opt_core.generation.plan.BUCKET`.

    Args:
        model: a `FlaxOPTForCausalLM`.
        input_ids: [B, T]; None starts from the beginning-of-sequence token.
        generation_config: options instead of the model's own.
        attention_mask: [B, T], 1 at real tokens; by default told by the pad token.
        inputs_embeds: [B, T, E], instead of the ids, or of the ids given.
        past_key_values: a cache of the first tokens of `input_ids`, with a row for each prompt,
            whatever the number of beams.
        negative_prompt_ids: [B, any] what `guidance_scale` leads away from, with its mask
            `negative_prompt_attention_mask`; by default the last token of each prompt.
        seed: of the sampling; None draws a fresh one from the operating system.
        noise: the sampling's Gumbel noise itself, [steps, rows, V].
        params: the parameters to use instead of `model.params`.
        prng_key: a key of the sampling instead of a seed.
        options: fields of `GenerationConfig` that override it, and objects of `Hooks`.

    Returns:
        `sequences` [B x num_return_sequences, T + new tokens], int32: the prompts as given (none of
        embeddings alone), then the new tokens; rows that ended early are filled with the pad token.
        Inside another `jax.jit`, where shapes cannot depend on values, always with as many columns as
        were asked for. With `return_dict_in_generate`, what else was asked for.

    Raises:
        InputError: options or prompts that do not fit each other or the model.
        UnsupportedError: an option that OPT models cannot have.
    """
    hooks = Hooks.taken_from(options)
    own = model.generation_config
    config = GenerationConfig.of_call(generation_config, own, model.config, options)
    params = model._given(params)
    past = None if past_key_values is None else KVCache.from_pairs(past_key_values)
    embeds = None if inputs_embeds is None else jnp.asarray(inputs_embeds)
    texts = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "negative_prompt_ids": negative_prompt_ids,
        "negative_prompt_attention_mask": negative_prompt_attention_mask,
    }
    is_traced = within_program((jnp.zeros(()), params, texts, embeds, past, noise, prng_key))
    xp = jnp if within_program(texts) else np
    if xp is jnp:
        texts = {name: None if x is None else to_array(name, x) for name, x in texts.items()}
    given = GivenPrompts(
        texts["input_ids"],
        texts["attention_mask"],
        embeds_shape=None if embeds is None else embeds.shape,
        past=None if past is None else past.shapes(waits=True),
        negative_ids=texts["negative_prompt_ids"],
        negative_mask=texts["negative_prompt_attention_mask"],
    )
    prompts = read_prompts(given, config, model.config, xp)
    past = past if prompts.lengths.past else None  # an empty one is none
    plan = make_plan(config, model.config, prompts.lengths, hooks)
    positions = prompts.lengths.longest + plan.max_new_tokens - 1
    hooks.check_assistant(model, positions, from_ids=embeds is None and past is None)
    rows = len(prompts.known) * plan.strategy.rows
    key, noise = _randomness(plan, model, rows, seed, noise, prng_key, is_traced)
    watch = Watch(config, hooks, plan, np.asarray, partial(jnp.repeat, axis=0))
    on_host = watch.is_needed or plan.needs_host
    for owner in (model, hooks.assistant_model):
        if owner is not None:
            owner.programs = programs_of(owner.module)  # which live as long as a model has them
    if is_traced and on_host:
        raise UnsupportedError(
            "Inside jax.jit, generate runs nothing on the host: no constrained or assisted search, no "
            "streamer, no criteria or functions of the caller's, no return_dict_in_generate. Call it "
            "outside, where it compiles itself."
        )
    watch.start(prompts.given, len(prompts.known))
    wide, padded = plan, prompts
    if not config.return_dict_in_generate:  # which shows the columns of caches and attentions
        wide, padded = bucketed(plan, prompts, xp)
    inputs = _inputs(wide, padded, embeds, past, plan.max_new_tokens)
    if on_host:
        decoded = run(model.module, wide, params, inputs, key, noise, watch, hooks.assistant_model)
    else:
        decoded = run_compiled(model.module, compiled_run)(params, wide, inputs, key, noise)
    watch.end()
    return _output(plan, prompts, decoded, config, watch)


def run(
    module: Any,
    plan: DecodePlan,
    params: Any,
    inputs: Inputs,
    key: Array | None,
    noise: Array | None,
    watch: Watch | None = None,
    assistant: Any = None,
) -> Decoded:
    """Prefills and decodes."""
    output = prefill(module, params, plan, inputs, watch)
    step = decode_step(module, params, plan, inputs, watch)
    state = first_state(plan.layout, inputs, output)
    draw = _noise(key, noise, state.logits.shape)
    loop = LOOPS[type(plan.strategy)]
    if assistant is not None:
        own = (assistant.module, assistant.params, plan, inputs, None)
        loop = partial(loop, assistant=(prefill(*own).cache, decode_step(*own)))
    return loop(plan, state, step, draw, watch)


def compiled_run(
    module: Any,
    params: Any,
    plan: DecodePlan,
    inputs: Inputs,
    key: Array | None,
    noise: Array | None,
) -> Decoded:
    """`run`, compiled as a whole, with the plan's numbers as they are at run time."""
    return run(module, plan, params, inputs, key, noise)._replace(cache=None)


def _inputs(
    plan: DecodePlan, prompts: Prompts, embeds: Array | None, past: KVCache | None, limit: int
) -> Inputs:
    pads = plan.prompt_length - prompts.lengths.columns
    if embeds is not None:
        embeds = jnp.take_along_axis(jnp.asarray(embeds), prompts.order[:, :, None], axis=1)
        embeds = jnp.pad(embeds, ((0, 0), (pads, 0), (0, 0)))
    if past is not None:
        past = past.with_capacity(plan.capacity, pads)
    limits = np.array([prompts.offset, limit], np.int32)
    return Inputs(prompts.tokens, prompts.mask, prompts.known, embeds, past, *limits)


def _output(
    plan: DecodePlan, prompts: Prompts, decoded: Decoded, config: GenerationConfig, watch: Watch
) -> GenerateOutput:
    """The sequences, and what else was asked for."""
    is_traced = within_program(decoded)
    xp = jnp if is_traced else np  # where other numbers of columns compile nothing
    count = plan.max_new_tokens if is_traced else int(decoded.length)
    sequences = xp.asarray(decoded.tokens)[:, :count]
    if prompts.given is not None:
        given = xp.repeat(xp.asarray(prompts.given), plan.num_return_sequences, axis=0)
        sequences = xp.concatenate([given, sequences], axis=1)
    sequences = jnp.asarray(sequences)
    if not config.return_dict_in_generate:
        return GenerateOutput(sequences=sequences)
    cache = decoded.cache
    if plan.is_guided and cache is not None:  # whose second half guides
        cache = cache.take(jnp.arange(len(cache.layers[0].key) // 2))
    return GenerateOutput(
        sequences=sequences,
        sequences_scores=decoded.sequences_scores,
        beam_indices=decoded.beam_indices,
        past_key_values=cache,
        **watch.records,
    )


def _randomness(
    plan: DecodePlan,
    model: Any,
    rows: int,
    seed: int | None,
    noise: Any,
    prng_key: Array | None,
    is_traced: bool,
) -> tuple[Array | None, Array | None]:
    """The sampling's key, or its Gumbel noise [steps, rows, V]; two Nones where nothing is sampled."""
    seed = check_seed(seed, noise, plan.strategy.do_sample)
    if not plan.strategy.do_sample:
        return None, None
    if noise is not None:
        noise = jnp.asarray(noise)
        check_noise(noise.shape, (plan.max_new_tokens, rows, model.config.vocab_size))
        return None, noise
    if seed is not None and prng_key is not None:
        raise InputError("Give seed or prng_key, not both: each of them decides the sampling.")
    if prng_key is None and seed is None and is_traced:
        raise InputError("Inside jax.jit, sampling needs a prng_key, a seed or noise.")
    if prng_key is None:
        prng_key = jax.random.key(secrets.randbits(31) if seed is None else seed)
    return prng_key, None


def _noise(key: Array | None, noise: Array | None, shape: tuple[int, ...]) -> Noise | None:
    """The Gumbel noise [rows, V] of each step; None where nothing is sampled."""
    if noise is not None:
        return noise.__getitem__
    if key is None:
        return None
    return lambda index: jax.random.gumbel(jax.random.fold_in(key, index), shape)
