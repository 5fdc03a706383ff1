# SPDX-License-Identifier: Apache-2.0
"""`generate`: from prompts and options to sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core.config import OPTConfig
from opt_core.errors import UnsupportedError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.plan import DecodePlan, GenerationMode, make_plan
from opt_core.generation.processors import MinLength
from opt_core.generation.prompts import (
    check_noise,
    check_prompt_shape,
    check_prompts,
    check_seed,
    infers_mask,
    start_of_text,
)
from opt_tf.generation.decode import Noise, decode, decode_step, prefill
from opt_tf.generation.state import DecodeState

#: Prompts are compiled for lengths that are multiples of this.
BUCKET = 32
_SMALLEST = float(np.finfo(np.float32).tiny)


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

    Padding may stand on either side: each row gets the tokens that it gets alone. The first call
    compiles; later ones with the same options, batch size and prompt length (up to the next multiple
    of `BUCKET`) run at once.

    Args:
        model: a `TFOPTForCausalLM`.
        input_ids: [B, T]; None starts from the beginning-of-sequence token.
        attention_mask: [B, T], 1 at real tokens; by default told by the pad token.
        generation_config: options instead of the model's own.
        seed: of the sampling; None draws a fresh one from TensorFlow's global generator.
        noise: the sampling's Gumbel noise itself, [steps, B x num_return_sequences, V].
        options: fields of `GenerationConfig` that override it.

    Returns:
        [B x num_return_sequences, T + new tokens], int32: the prompts as given, then the new tokens;
        rows that ended early are filled with the pad token.

    Raises:
        InputError: options or prompts that do not fit each other or the model.
        UnsupportedError: an option that this release does not have.
    """
    if not tf.executing_eagerly():
        raise UnsupportedError(
            "generate compiles itself and cannot be compiled into something else: call it directly, "
            "not inside a tf.function."
        )
    config = (generation_config or model.generation_config).replace(**options)
    input_ids = _prompts(input_ids, config)
    plan = make_plan(config, model.config, input_ids.shape[1])
    if attention_mask is None and infers_mask(config):
        attention_mask = input_ids != config.pad_token_id
    if attention_mask is None:
        attention_mask = tf.ones_like(input_ids)
    check_prompts(input_ids.numpy(), np.asarray(attention_mask), model.config)
    attention_mask = tf.cast(attention_mask, tf.int32)

    input_ids = tf.repeat(input_ids, plan.num_return_sequences, axis=0)
    attention_mask = tf.repeat(attention_mask, plan.num_return_sequences, axis=0)
    tokens, mask = align_right(input_ids, attention_mask)
    seed, noise = _randomness(plan, model, tokens.shape[0], seed, noise)
    plan, tokens, mask = bucketed(plan, model.config, tokens, mask)
    padded = not bool(tf.reduce_all(mask == 1))
    # Without padding no mask is needed, and the kernel is faster.
    new_tokens, count = compiled(model, plan)(tokens, mask if padded else None, seed, noise)
    return tf.concat([input_ids, new_tokens[:, : int(count)]], axis=1)


def bucketed(
    plan: DecodePlan, config: OPTConfig, tokens: Tensor, mask: Tensor
) -> tuple[DecodePlan, Tensor, Tensor]:
    """Plan and prompts with pads before them: so few lengths, and few compilations."""
    room = config.max_position_embeddings - plan.max_new_tokens + 1
    length = min(math.ceil(plan.prompt_length / BUCKET) * BUCKET, room)
    pads = length - plan.prompt_length
    processors = tuple(
        # It counts columns.
        replace(p, length=p.length + pads) if isinstance(p, MinLength) else p
        for p in plan.processors
    )
    plan = replace(plan, prompt_length=length, processors=processors)
    before = [[0, 0], [pads, 0]]
    return plan, tf.pad(tokens, before), tf.pad(mask, before)


def compiled(model: Any, plan: DecodePlan) -> Callable[..., tuple[Tensor, Tensor]]:
    """`run` for this model and plan, compiled once per shape of its arguments."""
    plan = replace(plan, num_return_sequences=1)  # by now these are rows
    key = (plan, len(model.variables))  # LoRA and quantization add variables
    if key not in model.compiled_plans:
        model.compiled_plans[key] = tf.function(
            partial(run, model, plan), jit_compile=True, autograph=False
        )
    return model.compiled_plans[key]


def run(
    model: Any,
    plan: DecodePlan,
    tokens: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Prefills and decodes: prompts [B, T], aligned to the right -> `decode`'s results."""
    batch, prompt_length = tokens.shape
    logits, cache = prefill(model, tokens, mask, plan)
    room = tf.ones((batch, plan.max_new_tokens), tokens.dtype)
    full_mask = tf.concat([tf.ones_like(tokens) if mask is None else mask, room], axis=1)  # [B, S]
    state = DecodeState(
        tokens=tf.concat([tokens, plan.pad_token_id * room], axis=1),
        mask=full_mask,
        length=tf.constant(prompt_length),
        prompt_length=tf.constant(prompt_length),
        finished=tf.zeros(batch, tf.bool),
        logits=logits,
        cache=replace(cache, length=tf.constant(cache.length)),
    )
    step_mask = None if mask is None else full_mask[:, : plan.capacity]
    counts = tf.reduce_sum(full_mask[:, :prompt_length], axis=1)
    step = decode_step(model, step_mask, counts, prompt_length)
    return decode(plan, state, step, _noise(model, batch, seed, noise))


def align_right(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves each row's real tokens to its right end, in order, and its pads to the left."""
    order = tf.argsort(mask, axis=1, stable=True)  # [B, T]
    return tf.gather(tokens, order, batch_dims=1), tf.gather(mask, order, batch_dims=1)


def _prompts(input_ids: Any, config: GenerationConfig) -> Tensor:
    if input_ids is None:
        input_ids = start_of_text(config)
    tokens = np.asarray(input_ids)
    check_prompt_shape(tokens.shape, str(tokens.dtype))
    return tf.constant(tokens, tf.int32)


def _randomness(
    plan: DecodePlan, model: Any, rows: int, seed: int | None, noise: Any
) -> tuple[Tensor | None, Tensor | None]:
    """The seed [2] or the noise [steps, rows, V] of sampling; two Nones where nothing is sampled."""
    check_seed(seed, noise)
    if plan.mode is GenerationMode.GREEDY:
        return None, None
    if noise is not None:
        noise = tf.cast(noise, tf.float32)
        check_noise(noise.shape, (plan.max_new_tokens, rows, model.config.vocab_size))
        return None, noise
    if seed is None:
        seed = int(tf.random.uniform((), maxval=2**62, dtype=tf.int64))
    return tf.constant([seed >> 31, seed & (2**31 - 1)], tf.int64), None


def _noise(model: Any, rows: int, seed: Tensor | None, noise: Tensor | None) -> Noise | None:
    """The Gumbel noise [rows, V] of each step; None where nothing is sampled."""
    if noise is not None:
        return partial(tf.gather, noise)
    if seed is None:
        return None

    def draw(index: Tensor) -> Tensor:
        shape = (rows, model.config.vocab_size)
        seed_of_step = tf.random.experimental.stateless_fold_in(seed, index)
        uniform = tf.random.stateless_uniform(shape, seed_of_step, minval=_SMALLEST)
        return -tf.math.log(-tf.math.log(uniform))

    return draw
