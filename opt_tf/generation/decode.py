# SPDX-License-Identifier: Apache-2.0
"""The two phases of decoding, and how a loop repeats the second.

Loops receive `step(tokens [B, T], cache, rows=None) -> StepOutput`, so they can be run without a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import tensorflow as tf
from tensorflow import Tensor

from opt_core.generation.plan import DecodePlan
from opt_core.generation.strategies import ContrastiveSearch
from opt_core.generation.watching import Watch
from opt_tf.cache import KVCache
from opt_tf.generation.dola import contrasted, early_logits
from opt_tf.generation.programs import run_compiled
from opt_tf.generation.state import DecodeState, Inputs, StepOutput
from opt_tf.masks import positions_from_mask

Step = Callable[..., StepOutput]
Noise = Callable[[Tensor], Tensor]
State = TypeVar("State")


def run_model(
    model: Any,
    watch: Watch | None,
    layers: tuple[int, ...],
    last: bool,
    tokens: Tensor | None,
    **arguments: Any,
) -> StepOutput:
    """One call of the model; with `last`, logits of the last column alone.

    With `layers`, the logits are those of DoLa.
    """
    sees = watch is not None and watch.sees_layers
    output, logits = run_compiled(model, forward, sees, layers, last)(tokens, arguments)
    if watch is not None and sees:
        used = int(output.past_key_values.used)
        watch.ran(output.attentions, output.hidden_states, used)
    return StepOutput(logits, output.last_hidden_state, output.past_key_values)


def forward(
    model: Any,
    sees: bool,
    layers: tuple[int, ...],
    last: bool,
    tokens: Tensor | None,
    arguments: Any,
) -> tuple[Any, Tensor]:
    """The base model's output and logits [B, 1 or T, V]."""
    output = model.model(
        tokens,
        use_cache=True,
        output_attentions=sees,
        output_hidden_states=sees or bool(layers),
        return_dict=True,
        **arguments,
    )
    columns = slice(-1, None) if last else slice(None)
    logits = model.compute_logits(output.last_hidden_state[:, columns])  # [B, 1 or T, V]
    if layers:
        early = [output.hidden_states[layer][:, columns] for layer in layers]  # each [B, T, D]
        logits = contrasted(logits, early_logits(model, early))
    return output, logits


def prefill(model: Any, plan: DecodePlan, inputs: Inputs, watch: Watch | None) -> StepOutput:
    """Runs the prompts [B, T] into a cache of fixed size; returns the logits of their last column."""
    mask, past_length = inputs.mask, plan.past_length
    cache = inputs.past
    if cache is None:
        cache = model.init_cache(mask.shape[0], plan.capacity)
    return run_model(
        model,
        watch,
        plan.dola_layers,
        True,
        inputs.tokens[:, past_length:] if inputs.embeds is None else None,
        inputs_embeds=inputs.embeds,
        attention_mask=mask if plan.is_padded else None,
        position_ids=positions_from_mask(mask, past_length, mask.shape[1] - past_length),
        past_key_values=cache,
    )


def decode_step(model: Any, plan: DecodePlan, inputs: Inputs, watch: Watch | None) -> Step:
    """The step of a loop: tokens [B, T] of all rows through the model, and of their guides.

    Or of `rows` [any] of them, each as often as it is named.
    """
    mask = tf.repeat(inputs.mask, plan.strategy.rows, axis=0)
    counts = tf.reduce_sum(mask, axis=1, keepdims=True)  # [B, 1] real tokens in each prompt
    room = tf.ones((mask.shape[0], plan.capacity - plan.prompt_length), mask.dtype)
    full_mask = tf.concat([mask, room], axis=1) if plan.is_padded else None  # [B, S]
    # Columns that proposals are filled up with may lie beyond the position table.
    last_position = model.config.max_position_embeddings - 1

    def step(tokens: Tensor, cache: KVCache, rows: Tensor | None = None) -> StepOutput:
        own_counts, own_mask = counts, full_mask
        if rows is not None:
            rows = in_halves(plan, rows, inputs.known.shape[0])
            own_counts = tf.gather(counts, rows)
            own_mask = None if full_mask is None else tf.gather(full_mask, rows)
        if plan.is_guided:
            tokens = tf.concat([tokens, tokens], axis=0)
        columns = cache.used + tf.range(tokens.shape[1])
        return run_model(
            model,
            watch,
            plan.dola_layers,
            False,
            tokens,
            attention_mask=own_mask,
            position_ids=tf.minimum(own_counts + columns - plan.prompt_length, last_position),
            past_key_values=cache,
        )

    return step


def in_halves(plan: DecodePlan, rows: Tensor, count: int) -> Tensor:
    """Some of `count` rows, followed by the rows that guide them, where there are such."""
    return tf.concat([rows, rows + count], axis=0) if plan.is_guided else rows


def first_state(plan: DecodePlan, inputs: Inputs, output: StepOutput) -> DecodeState:
    """The state after the prompts, each repeated for the rows that the strategy wants."""
    batch, repeats = inputs.known.shape[0], plan.strategy.rows
    tokens = tf.repeat(inputs.tokens[:batch], repeats, axis=0)  # [B, T]
    known = tf.repeat(inputs.known, repeats, axis=0)
    room = tf.ones((tokens.shape[0], plan.max_new_tokens), known.dtype)
    state = DecodeState(
        tokens=tf.concat([tokens, room * plan.pad_token_id], axis=1),
        mask=tf.concat([known, room], axis=1),
        length=tf.constant(plan.prompt_length),
        prompt_length=tf.constant(plan.prompt_length),
        offset=inputs.offset,
        limit=inputs.limit,
        finished=tf.zeros(tokens.shape[0], tf.bool),
        logits=output.logits[:, -1],
        cache=None,
        context=_context(plan, inputs, output),
    )
    cache = replace(output.cache, length=tf.constant(plan.prompt_length))
    return state.after(repeated(output._replace(cache=cache), repeats))


def _context(plan: DecodePlan, inputs: Inputs, output: StepOutput) -> Tensor | None:
    """Hidden states [B, S, E] of the prompts, for strategies that compare candidates with them.

    Pads, and columns not yet filled, hold the last token's: that changes no maximum over columns.
    """
    if not isinstance(plan.strategy, ContrastiveSearch):
        return None
    hidden_states = output.hidden_states[: inputs.known.shape[0]]  # [B, T, E]
    mask, last = inputs.mask[: inputs.known.shape[0], :, None], hidden_states[:, -1:]
    room = tf.repeat(last, plan.max_new_tokens, axis=1)
    return tf.concat([tf.where(mask == 1, hidden_states, last), room], axis=1)


def repeated(output: StepOutput, repeats: int) -> StepOutput:
    """The output with each row repeated."""
    if repeats == 1:
        return output
    rows = tf.repeat(tf.range(output.logits.shape[0]), repeats)
    hidden_states = output.hidden_states
    if hidden_states is not None:
        hidden_states = tf.gather(hidden_states, rows)
    cache = None if output.cache is None else output.cache.take(rows)
    return StepOutput(tf.gather(output.logits, rows), hidden_states, cache)


def repeat(
    goes_on: Callable[[State], Tensor],
    advance: Callable[[State], State],
    state: State,
    watch: Watch | None,
) -> State:
    """Advances as long as it goes on: as a whole where nobody watches, where that can be compiled."""
    if watch is None:
        return _compiled_while(goes_on, advance, state)
    while goes_on(state):
        state = advance(state)
    return state


def _compiled_while(
    goes_on: Callable[[State], Tensor], advance: Callable[[State], State], state: State
) -> State:
    """`tf.while_loop` for a state whose fields may be None, and then stay so."""
    exists = [leaf is not None for leaf in tf.nest.flatten(state)]

    def leaves(state: State) -> list[Tensor]:
        return [leaf for leaf in tf.nest.flatten(state) if leaf is not None]

    def packed(values: tuple[Tensor, ...]) -> State:
        rest = iter(values)
        return tf.nest.pack_sequence_as(state, [next(rest) if some else None for some in exists])

    values = tf.while_loop(
        lambda *values: goes_on(packed(values)),
        lambda *values: leaves(advance(packed(values))),
        leaves(state),
    )
    return packed(values)


def watched(state: DecodeState, watch: Watch | None) -> DecodeState:
    """Shows a state with a new column to the host, which may end rows."""
    if watch is None:
        return state
    tokens = state.tokens[:, int(state.offset) : int(state.length)]
    ends = watch.chose(tokens, state.scores, state.logits)
    return state._replace(finished=state.finished | ends)
