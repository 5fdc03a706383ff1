# SPDX-License-Identifier: Apache-2.0
"""The two phases of decoding, and how a loop repeats the second.

Loops receive `step(tokens [B, T], cache, rows=None) -> StepOutput`, so they can be run without a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from opt_core.generation.plan import DecodePlan
from opt_core.generation.strategies import ContrastiveSearch
from opt_core.generation.watching import Watch
from opt_flax.cache import KVCache
from opt_flax.generation.dola import contrasted, early_logits
from opt_flax.generation.programs import apart, run_compiled
from opt_flax.generation.state import DecodeState, Inputs, StepOutput
from opt_flax.masks import positions_from_mask

Step = Callable[..., StepOutput]
Noise = Callable[[Array], Array]
State = TypeVar("State")


def run_model(
    module: Any,
    params: Any,
    watch: Watch | None,
    layers: tuple[int, ...],
    last: bool,
    tokens: Array | None,
    **arguments: Any,
) -> StepOutput:
    """One call of the model; with `last`, logits of the last column alone.

    With `layers`, the logits are those of DoLa.
    """
    sees = watch is not None and watch.sees_layers
    run = run_compiled(module, forward, sees, layers, last)
    output, attentions, hidden_states = run(params, tokens, arguments)
    if watch is not None and sees:
        watch.ran(attentions, hidden_states, int(output.cache.used))
    return output


def forward(
    module: Any,
    sees: bool,
    layers: tuple[int, ...],
    last: bool,
    params: Any,
    tokens: Array | None,
    arguments: Any,
) -> tuple[StepOutput, Any, Any]:
    """A step's output, attentions and hidden states."""

    def run(bound: Any) -> tuple[StepOutput, Any, Any]:
        # The module is called as a whole, as whoever wrapped it (qwix, for one) expects.
        output = bound(
            tokens,
            last=last,
            use_cache=True,
            output_attentions=sees,
            output_hidden_states=True,
            return_dict=True,
            **arguments,
        )
        logits, hidden_states = output.logits, output.hidden_states
        if layers:
            columns = slice(-1, None) if last else slice(None)
            early = [hidden_states[layer][:, columns] for layer in layers]  # each [B, T, D]
            logits = contrasted(logits, early_logits(bound, early))
        step = StepOutput(logits, hidden_states[-1], output.past_key_values)
        return step, output.attentions, hidden_states if sees else None

    return nn.apply(run, module)({"params": params})


def prefill(
    module: Any, params: Any, plan: DecodePlan, inputs: Inputs, watch: Watch | None
) -> StepOutput:
    """Runs the prompts [B, T] into a cache of fixed size; returns the logits of their last column."""
    mask, past_length = inputs.mask, plan.past_length
    output = run_model(
        module,
        params,
        watch,
        plan.dola_layers,
        True,
        inputs.tokens[:, past_length:] if inputs.embeds is None else None,
        inputs_embeds=inputs.embeds,
        attention_mask=mask if plan.is_padded else None,
        position_ids=prompt_positions(plan.layout, mask),
        past_key_values=inputs.past,
    )
    if inputs.past is None:
        output = output._replace(cache=with_room(plan.layout, output.cache))
    return output


@apart
def prompt_positions(plan: DecodePlan, mask: Array) -> Array:
    """The positions [B, T] of the prompts' columns that are not in a cache."""
    return positions_from_mask(mask, plan.past_length, mask.shape[1] - plan.past_length)


@apart
def with_room(plan: DecodePlan, cache: KVCache) -> KVCache:
    """The prompts' cache as one of fixed size."""
    return cache.with_capacity(plan.capacity)


def decode_step(
    module: Any, params: Any, plan: DecodePlan, inputs: Inputs, watch: Watch | None
) -> Step:
    """The step of a loop: tokens [B, T] of all rows through the model, and of their guides.

    Or of `rows` [any] of them, each as often as it is named.
    """
    counts, full_mask = prompt_columns(plan, inputs.mask)
    layout = plan.layout
    # Columns that proposals are filled up with may lie beyond the position table.
    last_position = module.config.max_position_embeddings - 1

    def step(tokens: Array, cache: KVCache, rows: Array | None = None) -> StepOutput:
        if rows is not None:
            rows = in_halves(plan, rows, len(inputs.known))
        tokens, mask, position_ids = step_inputs(
            layout, tokens, cache.used, counts, full_mask, rows, last_position
        )
        return run_model(
            module,
            params,
            watch,
            plan.dola_layers,
            False,
            tokens,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
        )

    return step


def prompt_columns(plan: DecodePlan, mask: Array) -> tuple[Array, Array | None]:
    """How many real tokens [B, 1] each prompt has, and the mask [B, S] of all columns."""
    xp = np if isinstance(mask, np.ndarray) else jnp  # numpy compiles nothing
    mask = xp.repeat(mask, plan.strategy.rows, axis=0)
    room = xp.ones((len(mask), plan.capacity - plan.prompt_length), mask.dtype)
    full_mask = xp.concatenate([mask, room], axis=1) if plan.is_padded else None
    return mask.sum(axis=1, keepdims=True), full_mask


@apart
def step_inputs(
    plan: DecodePlan,
    tokens: Array,
    used: int | Array,
    counts: Array,
    full_mask: Array | None,
    rows: Array | None,
    last_position: int,
) -> tuple[Array, Array | None, Array]:
    """Tokens [B, T] after `used` columns, the guides' too, their mask and positions."""
    if rows is not None:
        counts, full_mask = counts[rows], None if full_mask is None else full_mask[rows]
    if plan.is_guided:
        tokens = jnp.concatenate([tokens, tokens])
    columns = used + jnp.arange(tokens.shape[1])
    positions = jnp.minimum(counts + columns - plan.prompt_length, last_position)
    return tokens, full_mask, positions


def in_halves(plan: DecodePlan, rows: Array, count: int) -> Array:
    """Some of `count` rows, followed by the rows that guide them, where there are such."""
    return jnp.concatenate([rows, rows + count]) if plan.is_guided else rows


@apart
def first_state(plan: DecodePlan, inputs: Inputs, output: StepOutput) -> DecodeState:
    """The state after the prompts, each repeated for the rows that the strategy wants."""
    batch, repeats = len(inputs.known), plan.strategy.rows
    tokens = jnp.repeat(inputs.tokens[:batch], repeats, axis=0)  # [B, T]
    known = jnp.repeat(inputs.known, repeats, axis=0)
    room = jnp.ones((len(tokens), plan.max_new_tokens), known.dtype)
    state = DecodeState(
        tokens=jnp.concatenate([tokens, room * plan.pad_token_id], axis=1),
        mask=jnp.concatenate([known, room], axis=1),
        length=jnp.asarray(plan.prompt_length, jnp.int32),
        prompt_length=plan.prompt_length,
        offset=inputs.offset,
        limit=inputs.limit,
        finished=jnp.zeros(len(tokens), bool),
        logits=output.logits[:, -1],
        cache=None,
        context=_context(plan, inputs, output),
    )
    return state.after(repeated(output, repeats))


def _context(plan: DecodePlan, inputs: Inputs, output: StepOutput) -> Array | None:
    """Hidden states [B, S, E] of the prompts, for strategies that compare candidates with them.

    Pads, and columns not yet filled, hold the last token's: that changes no maximum over columns.
    """
    if not isinstance(plan.strategy, ContrastiveSearch):
        return None
    hidden_states = output.hidden_states[: len(inputs.known)]  # [B, T, E]
    mask, last = inputs.mask[: len(inputs.known), :, None], hidden_states[:, -1:]
    room = jnp.repeat(last, plan.max_new_tokens, axis=1)
    return jnp.concatenate([jnp.where(mask == 1, hidden_states, last), room], axis=1)


def repeated(output: StepOutput, repeats: int) -> StepOutput:
    """The output with each row repeated."""
    if repeats == 1:
        return output
    rows = jnp.repeat(jnp.arange(len(output.logits)), repeats)
    hidden_states = None if output.hidden_states is None else output.hidden_states[rows]
    cache = None if output.cache is None else output.cache.take(rows)
    return StepOutput(output.logits[rows], hidden_states, cache)


def repeat(
    goes_on: Callable[[State], Array],
    advance: Callable[[State], State],
    state: State,
    watch: Watch | None,
) -> State:
    """Advances as long as it goes on: as a whole where nobody watches, where that can be compiled."""
    if watch is None:
        return jax.lax.while_loop(goes_on, advance, state)
    while goes_on(state):
        state = advance(state)
    return state


def watched(state: DecodeState, watch: Watch | None) -> DecodeState:
    """Shows a state with a new column to the host, which may end rows."""
    if watch is None:
        return state
    # In numpy, where another number of columns compiles nothing.
    tokens = jnp.asarray(np.asarray(state.tokens)[:, int(state.offset) : int(state.length)])
    ends = watch.chose(tokens, state.scores, state.logits)
    return replace(state, finished=state.finished | ends)
