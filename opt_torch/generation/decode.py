# SPDX-License-Identifier: Apache-2.0
"""The two phases of decoding, and how a loop repeats the second.

Loops receive `step(tokens [B, T], cache, rows=None) -> StepOutput`, so they can be run without a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from opt_core.generation.plan import DecodePlan
from opt_core.generation.strategies import ContrastiveSearch
from opt_core.generation.watching import Watch
from opt_torch.cache import KVCache
from opt_torch.generation.dola import contrasted, early_logits
from opt_torch.generation.state import DecodeState, Inputs, StepOutput, sent
from opt_torch.masks import positions_from_mask

Step = Callable[..., StepOutput]
Noise = Callable[[int], Tensor]
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
    output = model.model(
        tokens,
        use_cache=True,
        output_attentions=sees,
        output_hidden_states=sees or bool(layers),
        return_dict=True,
        **arguments,
    )
    if watch is not None and sees:
        used = int(output.past_key_values.used)
        watch.ran(output.attentions, output.hidden_states, used)
    columns = slice(-1, None) if last else slice(None)
    logits = model.lm_head(output.last_hidden_state[:, columns])  # [B, 1 or T, V]
    if layers:
        early = [output.hidden_states[layer][:, columns] for layer in layers]  # each [B, T, D]
        logits = contrasted(logits, early_logits(model, early))
    return StepOutput(logits, output.last_hidden_state, output.past_key_values)


def prefill(model: Any, plan: DecodePlan, inputs: Inputs, watch: Watch | None) -> StepOutput:
    """Runs the prompts [B, T] into a cache of fixed size; returns the logits of their last column."""
    mask, past_length = inputs.mask, plan.past_length
    cache = model.init_cache(len(mask), plan.capacity) if inputs.past is None else inputs.past
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


def step_forward(model: Any, plan: DecodePlan, watch: Watch | None) -> Callable[..., StepOutput]:
    """The call of the model in a step: tokens, and `run_model`'s arguments by name."""
    return partial(run_model, model, watch, plan.dola_layers, False)


def decode_step(
    model: Any,
    plan: DecodePlan,
    inputs: Inputs,
    watch: Watch | None,
    forward: Callable[..., StepOutput] | None = None,
) -> Step:
    """The step of a loop: tokens [B, T] of all rows through the model, and of their guides.

    Or of `rows` [any] of them, each as often as it is named.

    Args:
        forward: what is called in place of the model.
    """
    forward = forward or step_forward(model, plan, watch)
    mask = inputs.mask.repeat_interleave(plan.strategy.rows, dim=0)
    counts = mask.sum(dim=1, keepdim=True)  # [B, 1] real tokens in each prompt
    room = mask.new_ones((len(mask), plan.capacity - plan.prompt_length))
    full_mask = torch.cat([mask, room], dim=1) if plan.is_padded else None  # [B, S]

    def step(tokens: Tensor, cache: KVCache, rows: Tensor | None = None) -> StepOutput:
        own_counts, own_mask = counts, full_mask
        if rows is not None:
            rows = in_halves(plan, rows, len(inputs.known))
            own_counts, own_mask = counts[rows], None if full_mask is None else full_mask[rows]
        if plan.is_guided:
            tokens = torch.cat([tokens, tokens])
        columns = cache.used + torch.arange(tokens.shape[1], device=tokens.device)
        return forward(
            tokens,
            attention_mask=own_mask,
            position_ids=own_counts + columns - plan.prompt_length,
            past_key_values=cache,
        )

    return step


def in_halves(plan: DecodePlan, rows: Tensor, count: int) -> Tensor:
    """Some of `count` rows, followed by the rows that guide them, where there are such."""
    return torch.cat([rows, rows + count]) if plan.is_guided else rows


def first_state(plan: DecodePlan, inputs: Inputs, output: StepOutput) -> DecodeState:
    """The state after the prompts, each repeated for the rows that the strategy wants."""
    batch, repeats = len(inputs.known), plan.strategy.rows
    tokens = inputs.tokens[:batch].repeat_interleave(repeats, dim=0)  # [B, T]
    known = inputs.known.repeat_interleave(repeats, dim=0)
    room = known.new_ones((len(tokens), plan.max_new_tokens))
    state = DecodeState(
        tokens=torch.cat([tokens, room * plan.pad_token_id], dim=1),
        mask=torch.cat([known, room], dim=1),
        length=plan.prompt_length,
        prompt_length=plan.prompt_length,
        offset=inputs.offset,
        limit=inputs.limit,
        finished=torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device),
        logits=output.logits[:, -1],
        cache=None,
        context=_context(plan, inputs, output),
    )
    if plan.is_static and output.cache is not None:
        length = torch.full((), plan.prompt_length, device=tokens.device)
        output = output._replace(cache=replace(output.cache, length=length))
    return state.after(repeated(output, repeats))


def _context(plan: DecodePlan, inputs: Inputs, output: StepOutput) -> Tensor | None:
    """Hidden states [B, S, E] of the prompts, for strategies that compare candidates with them.

    Pads, and columns not yet filled, hold the last token's: that changes no maximum over columns.
    """
    if not isinstance(plan.strategy, ContrastiveSearch):
        return None
    hidden_states = output.hidden_states[: len(inputs.known)]  # [B, T, E]
    mask, last = inputs.mask[: len(inputs.known), :, None], hidden_states[:, -1:]
    room = last.repeat_interleave(plan.max_new_tokens, dim=1)
    return torch.cat([torch.where(mask == 1, hidden_states, last), room], dim=1)


def repeated(output: StepOutput, repeats: int) -> StepOutput:
    """The output with each row repeated."""
    if repeats == 1:
        return output
    rows = torch.arange(len(output.logits), device=output.logits.device)
    rows = rows.repeat_interleave(repeats)
    hidden_states = None if output.hidden_states is None else output.hidden_states[rows]
    cache = None if output.cache is None else output.cache.take(rows)
    return StepOutput(output.logits[rows], hidden_states, cache)


def repeat(
    goes_on: Callable[[State], bool],
    advance: Callable[[State], State],
    state: State,
    watch: Watch | None,
) -> State:
    """Advances as long as it goes on: as a whole where nobody watches, where that can be compiled."""
    while goes_on(state):
        state = advance(state)
    return state


def watched(state: DecodeState, watch: Watch | None) -> DecodeState:
    """Shows a state with a new column to the host, which may end rows."""
    if watch is None:
        return state
    tokens = state.tokens[:, state.offset : state.length]
    ends = watch.chose(tokens, state.scores, state.logits)
    if not ends.any():  # nothing to send to an accelerator
        return state
    return replace(state, finished=state.finished | sent(ends, state.finished.device))
