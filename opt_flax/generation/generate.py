# SPDX-License-Identifier: Apache-2.0
"""`generate`: from prompts and options to sequences."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from opt_core.errors import InputError
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
from opt_flax.generation.decode import Noise, decode, decode_step, prefill
from opt_flax.generation.state import DecodeState
from opt_flax.outputs import GenerateOutput


def generate(
    model: Any,
    input_ids: Any = None,
    *,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    seed: int | None = None,
    noise: Any = None,
    params: Mapping[str, Any] | None = None,
    prng_key: Array | None = None,
    **options: Any,
) -> GenerateOutput:
    """Continues each prompt, greedily or by sampling.

    Padding may stand on either side: each row gets the tokens that it gets alone. The first call
    with a plan and shapes compiles; those that follow reuse it.

    Args:
        model: a `FlaxOPTForCausalLM`.
        input_ids: [B, T]; None starts from the beginning-of-sequence token.
        attention_mask: [B, T], 1 at real tokens; by default told by the pad token.
        generation_config: options instead of the model's own.
        seed: of the sampling; None draws a fresh one from the operating system.
        noise: the sampling's Gumbel noise itself, [steps, B x num_return_sequences, V].
        params: the parameters to use instead of `model.params`.
        prng_key: a key of the sampling instead of a seed.
        options: fields of `GenerationConfig` that override it.

    Returns:
        `sequences` [B x num_return_sequences, T + new tokens], int32: the prompts as given, then the
        new tokens; rows that ended early are filled with the pad token. Inside another `jax.jit`,
        where shapes cannot depend on values, always with as many columns as were asked for.

    Raises:
        InputError: options or prompts that do not fit each other or the model.
        UnsupportedError: an option that this release does not have.
    """
    config = (generation_config or model.generation_config).replace(**options)
    params = model.params if params is None else params
    input_ids = _prompts(input_ids, config)
    plan = make_plan(config, model.config, input_ids.shape[1])
    if attention_mask is None and infers_mask(config):
        attention_mask = input_ids != config.pad_token_id
    if attention_mask is None:
        attention_mask = jnp.ones_like(input_ids)
    attention_mask = jnp.asarray(attention_mask)
    padded = True
    if not any(isinstance(x, jax.core.Tracer) for x in (input_ids, attention_mask)):
        check_prompts(np.asarray(input_ids), np.asarray(attention_mask), model.config)
        padded = not np.asarray(attention_mask).all()
    elif plan.mode is GenerationMode.SAMPLE and seed is prng_key is noise is None:
        raise InputError("Inside jax.jit, sampling needs a prng_key, a seed or noise.")
    attention_mask = attention_mask.astype(jnp.int32)

    input_ids = jnp.repeat(input_ids, plan.num_return_sequences, axis=0)
    attention_mask = jnp.repeat(attention_mask, plan.num_return_sequences, axis=0)
    tokens, mask = align_right(input_ids, attention_mask) if padded else (input_ids, None)
    noise = _noise(plan, model, len(tokens), seed, noise, prng_key)
    new_tokens, count = run(model.module, plan, params, tokens, mask, *noise)
    if not isinstance(count, jax.core.Tracer):
        new_tokens = new_tokens[:, : int(count)]
    return GenerateOutput(sequences=jnp.concatenate([input_ids, new_tokens], axis=1))


@partial(jax.jit, static_argnames=("module", "plan"))
def run(
    module: Any,
    plan: DecodePlan,
    params: Any,
    tokens: Array,
    mask: Array | None,
    key: Array | None,
    noise: Array | None,
) -> tuple[Array, Array]:
    """Prefills and decodes: prompts [B, T], aligned to the right -> `decode`'s results.

    Compiled as a whole. Without padding `mask` is None: no mask is needed, and it is faster so.
    """
    batch, prompt_length = tokens.shape
    logits, cache = prefill(module, params, tokens, mask, plan)
    room = jnp.ones((batch, plan.max_new_tokens), tokens.dtype)
    full_mask = jnp.concatenate([jnp.ones_like(tokens) if mask is None else mask, room], axis=1)
    state = DecodeState(
        tokens=jnp.concatenate([tokens, jnp.full_like(room, plan.pad_token_id)], axis=1),
        mask=full_mask,
        length=jnp.asarray(prompt_length, jnp.int32),
        prompt_length=prompt_length,
        finished=jnp.zeros(batch, bool),
        logits=logits,
        cache=cache,
    )
    step_mask = None if mask is None else full_mask[:, : plan.capacity]
    counts = full_mask[:, :prompt_length].sum(axis=1)
    step = decode_step(module, params, step_mask, counts, prompt_length)
    return decode(plan, state, step, _draw(key, noise, logits.shape))


def align_right(tokens: Array, mask: Array) -> tuple[Array, Array]:
    """Moves each row's real tokens to its right end, in order, and its pads to the left."""
    order = jnp.argsort(mask, axis=1, stable=True)  # [B, T]
    return jnp.take_along_axis(tokens, order, axis=1), jnp.take_along_axis(mask, order, axis=1)


def _prompts(input_ids: Any, config: GenerationConfig) -> Array:
    if input_ids is None:
        input_ids = start_of_text(config)
    tokens = jnp.asarray(input_ids)
    check_prompt_shape(tokens.shape, str(tokens.dtype))
    return tokens.astype(jnp.int32)


def _noise(
    plan: DecodePlan, model: Any, rows: int, seed: int | None, noise: Any, prng_key: Array | None
) -> tuple[Array | None, Array | None]:
    """The sampling's key, or its Gumbel noise [steps, rows, V]; two Nones where nothing is sampled."""
    check_seed(seed, noise)
    if plan.mode is GenerationMode.GREEDY:
        return None, None
    shape = (rows, model.config.vocab_size)
    if noise is not None:
        noise = jnp.asarray(noise)
        check_noise(noise.shape, (plan.max_new_tokens, *shape))
        return None, noise
    if seed is not None and prng_key is not None:
        raise InputError("Give seed or prng_key, not both: each of them decides the sampling.")
    if prng_key is None:
        prng_key = jax.random.key(secrets.randbits(31) if seed is None else seed)
    return prng_key, None


def _draw(key: Array | None, noise: Array | None, shape: tuple[int, ...]) -> Noise | None:
    """The Gumbel noise [rows, V] of each step."""
    if noise is not None:
        return noise.__getitem__
    if key is None:
        return None
    return lambda index: jax.random.gumbel(jax.random.fold_in(key, index), shape)
