# SPDX-License-Identifier: Apache-2.0
"""The two phases of decoding, and the loop over the second.

The loop receives `step(token, cache) -> (logits, cache)`, so it can be run without a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from opt_core.generation.plan import DecodePlan
from opt_flax.cache import KVCache
from opt_flax.generation.processors import process
from opt_flax.generation.state import DecodeState

Step = Callable[[Array, Any], tuple[Array, Any]]
Noise = Callable[[Array], Array]


def last_logits(model: Any, *args: Any, **options: Any) -> tuple[Array, KVCache]:
    """Runs a bound module; returns the logits of the last column [B, V] and the cache."""
    hidden_states, cache = model.model(*args, use_cache=True, return_dict=False, **options)[:2]
    return model.logits(hidden_states[:, -1]), cache


def prefill(
    module: Any, params: Any, tokens: Array, mask: Array | None, plan: DecodePlan
) -> tuple[Array, KVCache]:
    """Runs the prompts [B, T] into a fresh cache; returns the last logits [B, V] and the cache."""
    run = nn.apply(last_logits, module)
    logits, cache = run({"params": params}, tokens, attention_mask=mask)
    return logits, cache.with_capacity(plan.capacity)


def decode_step(
    module: Any, params: Any, mask: Array | None, counts: Array, prompt_length: int
) -> Step:
    """The step of the loop: one token [B, 1] through the model.

    Args:
        mask: [B, S] for all columns of the cache, or None where no row is padded.
        counts: [B] real tokens in each prompt.
    """
    run = nn.apply(last_logits, module)

    def step(token: Array, cache: KVCache) -> tuple[Array, KVCache]:
        positions = (counts + cache.used - prompt_length)[:, None]  # [B, 1]
        return run(
            {"params": params},
            token,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
        )

    return step


def decode(
    plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None
) -> tuple[Array, Array]:
    """Decodes greedily, or samples where there is noise.

    Sampling is argmax(scores + noise) with Gumbel noise. A row that has ended continues with pads;
    the loop ends with the last row.

    Returns:
        The new tokens [B, new], and how many of these columns are filled, an int32 scalar.
    """
    eos = jnp.array(plan.eos_token_ids, jnp.int32)

    def choose(state: DecodeState) -> DecodeState:
        scores = process(plan.processors, state.logits, state)
        if noise is not None:
            scores = scores + noise(state.length - state.prompt_length)
        token = jnp.where(state.finished, plan.pad_token_id, scores.argmax(-1))  # [B]
        return replace(
            state,
            tokens=state.tokens.at[:, state.length].set(token.astype(state.tokens.dtype)),
            length=state.length + 1,
            finished=state.finished | jnp.isin(token, eos),
        )

    def goes_on(state: DecodeState) -> Array:
        return (state.length < state.tokens.shape[1]) & ~state.finished.all()

    def advance(state: DecodeState) -> DecodeState:
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=1)  # [B, 1]
        logits, cache = step(token, state.cache)
        return choose(replace(state, logits=logits, cache=cache))

    state = jax.lax.while_loop(goes_on, advance, choose(state))
    return state.tokens[:, state.prompt_length :], state.length - state.prompt_length
