# SPDX-License-Identifier: Apache-2.0
"""The two phases of decoding, and the loop over the second.

The loop receives `step(token, cache) -> (logits, cache)`, so it can be run without a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation.plan import DecodePlan
from opt_tf.cache import KVCache
from opt_tf.generation.processors import is_any_of, process
from opt_tf.generation.state import DecodeState

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
Noise = Callable[[Tensor], Tensor]


def prefill(
    model: Any, tokens: Tensor, mask: Tensor | None, plan: DecodePlan
) -> tuple[Tensor, KVCache]:
    """Runs the prompts [B, T] into a fresh cache; returns the last logits [B, V] and the cache."""
    cache = model.init_cache(tokens.shape[0], plan.capacity)
    hidden_states, cache = model.model(
        tokens, attention_mask=mask, past_key_values=cache, use_cache=True, return_dict=False
    )[:2]
    return model.compute_logits(hidden_states[:, -1]), cache


def decode_step(model: Any, mask: Tensor | None, counts: Tensor, prompt_length: int) -> Step:
    """The step of the loop: one token [B, 1] through the model.

    Args:
        mask: [B, S] for all columns of the cache, or None where no row is padded.
        counts: [B] real tokens in each prompt.
    """

    def step(token: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        positions = (counts + cache.used - prompt_length)[:, None]  # [B, 1]
        hidden_states, cache = model.model(
            token,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=False,
        )[:2]
        return model.compute_logits(hidden_states[:, -1]), cache

    return step


def decode(
    plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None
) -> tuple[Tensor, Tensor]:
    """Decodes greedily, or samples where there is noise.

    Sampling is argmax(scores + noise) with Gumbel noise. A row that has ended continues with pads;
    the loop ends with the last row.

    Returns:
        The new tokens [B, new], and how many of these columns are filled: a compiled loop can only
        return them all.
    """

    def choose(state: DecodeState) -> DecodeState:
        scores = process(plan.processors, state.logits, state)
        if noise is not None:
            scores = scores + noise(state.length - state.prompt_length)
        token = tf.argmax(scores, axis=-1, output_type=state.tokens.dtype)
        token = tf.where(state.finished, tf.cast(plan.pad_token_id, token.dtype), token)  # [B]
        return state._replace(
            tokens=keras.ops.slice_update(state.tokens, (0, state.length), token[:, None]),
            length=state.length + 1,
            finished=state.finished | is_any_of(token, plan.eos_token_ids),
        )

    def goes_on(state: DecodeState) -> Tensor:
        new_tokens = state.length - state.prompt_length
        return (new_tokens < plan.max_new_tokens) & ~tf.reduce_all(state.finished)

    def advance(state: DecodeState) -> tuple[DecodeState]:
        batch = tf.shape(state.tokens)[0]
        token = tf.slice(state.tokens, (0, state.length - 1), (batch, 1))  # [B, 1]
        logits, cache = step(token, state.cache)
        return (choose(state._replace(logits=logits, cache=cache)),)

    (state,) = tf.while_loop(goes_on, advance, (choose(state),))
    return state.tokens[:, plan.prompt_length :], state.length - state.prompt_length
