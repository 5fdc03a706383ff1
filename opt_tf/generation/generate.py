# SPDX-License-Identifier: Apache-2.0
"""`generate`: from prompts and options to sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_core.errors import UnsupportedError
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
from opt_tf.cache import KVCache
from opt_tf.generation.assisted import assisted_search
from opt_tf.generation.beam import beam_search
from opt_tf.generation.constrained import constrained_beam_search
from opt_tf.generation.contrastive import contrastive_search
from opt_tf.generation.decode import Noise, decode_step, first_state, prefill
from opt_tf.generation.programs import run_compiled
from opt_tf.generation.search import search
from opt_tf.generation.state import Decoded, Inputs
from opt_tf.outputs import GenerateOutput

LOOPS: Mapping[type[Strategy], Callable[..., Decoded]] = {
    Search: search,
    BeamSearch: beam_search,
    ConstrainedBeamSearch: constrained_beam_search,
    ContrastiveSearch: contrastive_search,
    AssistedSearch: assisted_search,
}
_SMALLEST = float(np.finfo(np.float32).tiny)


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

    Padding may stand on either side: each row gets the tokens that it gets alone. The first call
    with a plan compiles; those that follow reuse it, for lengths up to the next multiple of
    `opt_core.generation.plan.BUCKET`.

    Args:
        model: a `TFOPTForCausalLM`.
        input_ids: [B, T]; None starts from the beginning-of-sequence token.
        generation_config: options instead of the model's own.
        attention_mask: [B, T], 1 at real tokens; by default told by the pad token.
        inputs_embeds: [B, T, E], instead of the ids, or of the ids given.
        past_key_values: a cache of the first tokens of `input_ids`, with a row for each prompt,
            whatever the number of beams.
        negative_prompt_ids: [B, any] what `guidance_scale` leads away from, with its mask
            `negative_prompt_attention_mask`; by default the last token of each prompt.
        seed: of the sampling; None draws a fresh one from TensorFlow's global generator.
        noise: the sampling's Gumbel noise itself, [steps, rows, V].
        options: fields of `GenerationConfig` that override it, and objects of `Hooks`.

    Returns:
        [B x num_return_sequences, T + new tokens], int32: the prompts as given (none of embeddings
        alone), then the new tokens; rows that ended early are filled with the pad token. With
        `return_dict_in_generate`, a `GenerateOutput` of them and of what was asked for.

    Raises:
        InputError: options or prompts that do not fit each other or the model.
        UnsupportedError: an option that OPT models cannot have.
    """
    if not tf.executing_eagerly():
        raise UnsupportedError(
            "generate compiles itself and cannot be compiled into something else: call it directly, "
            "not inside a tf.function."
        )
    hooks = Hooks.taken_from(options)
    own = model.generation_config
    config = GenerationConfig.of_call(generation_config, own, model.config, options)
    past = None if past_key_values is None else KVCache.from_pairs(past_key_values)
    embeds = None if inputs_embeds is None else tf.convert_to_tensor(inputs_embeds)
    given = GivenPrompts(
        _array(input_ids),
        _array(attention_mask),
        embeds_shape=None if embeds is None else tuple(embeds.shape),
        past=None if past is None else past.shapes(),
        negative_ids=_array(negative_prompt_ids),
        negative_mask=_array(negative_prompt_attention_mask),
    )
    prompts = read_prompts(given, config, model.config)
    past = past if prompts.lengths.past else None  # an empty one is none
    plan = make_plan(config, model.config, prompts.lengths, hooks)
    positions = prompts.lengths.longest + plan.max_new_tokens - 1
    hooks.check_assistant(model, positions, from_ids=embeds is None and past is None)
    rows = len(prompts.known) * plan.strategy.rows
    randomness = _randomness(plan, model, rows, seed, noise)
    watch = Watch(config, hooks, plan, np.asarray, partial(tf.repeat, axis=0))
    on_host = watch.is_needed or plan.needs_host
    watch.start(prompts.given, len(prompts.known))
    wide, padded = plan, prompts
    if not config.return_dict_in_generate:  # which shows the columns of caches and attentions
        wide, padded = bucketed(plan, prompts)
    inputs = _inputs(wide, padded, embeds, past, plan.max_new_tokens)
    if on_host:
        decoded = run(model, wide, inputs, *randomness, watch, hooks.assistant_model)
    else:
        numbers = [tf.constant(x) for x in wide.numbers]
        decoded = run_compiled(model, compiled_run, wide.key)(inputs, *randomness, numbers)
    watch.end()
    return _output(plan, prompts, decoded, config, watch)


def run(
    model: Any,
    plan: DecodePlan,
    inputs: Inputs,
    seed: Tensor | None,
    noise: Tensor | None,
    watch: Watch | None = None,
    assistant: Any = None,
) -> Decoded:
    """Prefills and decodes."""
    output = prefill(model, plan, inputs, watch)
    step = decode_step(model, plan, inputs, watch)
    state = first_state(plan, inputs, output)
    draw = _noise(model, seed, noise, state.logits.shape)
    loop = LOOPS[type(plan.strategy)]
    if assistant is not None:
        own = (assistant, plan, inputs, None)
        loop = partial(loop, assistant=(prefill(*own).cache, decode_step(*own)))
    return loop(plan, state, step, draw, watch)


def compiled_run(
    model: Any,
    plan: DecodePlan,
    inputs: Inputs,
    seed: Tensor | None,
    noise: Tensor | None,
    numbers: list[Tensor],
) -> Decoded:
    """`run`, compiled as a whole, with the plan's numbers as they are at run time."""
    return run(model, plan.with_numbers(numbers), inputs, seed, noise)._replace(cache=None)


def _inputs(
    plan: DecodePlan, prompts: Prompts, embeds: Tensor | None, past: KVCache | None, limit: int
) -> Inputs:
    pads = plan.prompt_length - prompts.lengths.columns
    if embeds is not None:
        embeds = tf.gather(embeds, prompts.order, batch_dims=1)
        embeds = tf.pad(embeds, ((0, 0), (pads, 0), (0, 0)))
    if past is not None:
        past = past.with_capacity(plan.capacity, pads)
    tokens, mask, known, offset, limit = (
        tf.constant(x, tf.int32)
        for x in (prompts.tokens, prompts.mask, prompts.known, prompts.offset, limit)
    )
    return Inputs(tokens, mask, known, embeds, past, offset, limit)


def _output(
    plan: DecodePlan, prompts: Prompts, decoded: Decoded, config: GenerationConfig, watch: Watch
) -> Tensor | GenerateOutput:
    """The sequences, and what else was asked for."""
    sequences = decoded.tokens[:, : int(decoded.length)]
    if prompts.given is not None:
        given = tf.repeat(tf.constant(prompts.given), plan.num_return_sequences, axis=0)
        sequences = tf.concat([given, sequences], axis=1)
    if not config.return_dict_in_generate:
        return sequences
    cache = decoded.cache
    if plan.is_guided and cache is not None:  # whose second half guides
        cache = cache.take(tf.range(cache.layers[0].key.shape[0] // 2))
    return GenerateOutput(
        sequences=sequences,
        sequences_scores=decoded.sequences_scores,
        beam_indices=decoded.beam_indices,
        past_key_values=cache,
        **watch.records,
    )


def _array(value: Any) -> np.ndarray | None:
    """Token ids or a mask as numpy has them."""
    return value.numpy() if isinstance(value, Tensor) else value


def _randomness(
    plan: DecodePlan, model: Any, rows: int, seed: int | None, noise: Any
) -> tuple[Tensor | None, Tensor | None]:
    """The seed [2] or the noise [steps, rows, V] of sampling; two Nones where nothing is sampled."""
    seed = check_seed(seed, noise, plan.strategy.do_sample)
    if not plan.strategy.do_sample:
        return None, None
    if noise is not None:
        noise = tf.cast(noise, tf.float32)
        check_noise(noise.shape, (plan.max_new_tokens, rows, model.config.vocab_size))
        return None, noise
    if seed is None:
        seed = int(tf.random.uniform((), maxval=2**62, dtype=tf.int64))
    return tf.constant([seed >> 31, seed & (2**31 - 1)], tf.int64), None


def _noise(
    model: Any, seed: Tensor | None, noise: Tensor | None, shape: tuple[int, ...]
) -> Noise | None:
    """The Gumbel noise [rows, V] of each step; None where nothing is sampled."""
    if noise is not None:
        return partial(tf.gather, noise)
    if seed is None:
        return None
    # By XLA wherever it is called, which draws other numbers than a kernel.
    if tf.executing_eagerly():
        return partial(run_compiled(model, _gumbel, tuple(shape)), seed)
    draw = partial(_gumbel, model, tuple(shape))
    return partial(tf.function(draw, jit_compile=True, autograph=False), seed)


def _gumbel(model: Any, shape: tuple[int, ...], seed: Tensor, index: Tensor) -> Tensor:
    """The noise of a step."""
    seed_of_step = tf.random.experimental.stateless_fold_in(seed, index, alg="philox")
    uniform = tf.random.stateless_uniform(shape, seed_of_step, minval=_SMALLEST, alg="philox")
    return -tf.math.log(-tf.math.log(uniform))
