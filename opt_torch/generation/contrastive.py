# SPDX-License-Identifier: Apache-2.0
"""Contrastive search: the likeliest tokens are run, and compared with what stands before them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opt_core.generation.plan import DecodePlan
from opt_core.generation.strategies import ContrastiveSearch
from opt_core.generation.watching import Watch
from opt_torch.cache import KVCache, LayerCache
from opt_torch.generation.decode import Noise, Step, in_halves, repeat, watched
from opt_torch.generation.processors import process
from opt_torch.generation.search import append
from opt_torch.generation.state import Decoded, DecodeState, StepOutput


def contrastive_search(
    plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None, watch: Watch | None
) -> Decoded:
    """Takes among the likeliest tokens the one most unlike what stands before it.

    `generation/utils.py:contrastive_search` of the reference, for each row as if it were alone. Each
    step runs its candidates: in K copies of each row, or with `low_memory` one after the other.
    """
    rows = torch.arange(len(state.tokens), device=state.tokens.device)  # [B]

    def goes_on(state: DecodeState) -> bool:
        return state.step < state.limit and not bool(state.finished.all())

    def advance(state: DecodeState) -> DecodeState:
        scores = process(plan.processors, state.logits, state)
        probabilities, tokens = torch.topk(torch.softmax(scores, dim=-1), plan.strategy.top_k)
        directions, output = look_ahead(plan, tokens, state.cache, step, watch)
        best = rank(plan.strategy, state.context, directions, probabilities)  # [B]
        state.context[:, state.length] = directions[rows, best]
        state = watched(append(plan, state, tokens[rows, best], scores), watch)
        if output is None:
            return state.after(step(tokens[rows, best][:, None], state.cache))
        return state.after(of_best(plan, output, best, watch))

    cache = state.cache
    if not plan.strategy.low_memory:
        copies = rows.repeat_interleave(plan.strategy.top_k)
        cache = cache.take(in_halves(plan, copies, len(rows)))
    context = _directions(state.context)
    # What a loop carries has its fields and dtypes from the beginning on.
    state = replace(state, context=context, scores=state.logits.float(), cache=cache)
    state = repeat(goes_on, advance, state, watch)
    cache = None
    if watch is not None:
        watch.forget(1)  # the candidates for a token that is not asked for
        cache = _of_tokens(plan, state)
    return Decoded(state.tokens[:, plan.prompt_length :], state.step, cache)


def look_ahead(
    plan: DecodePlan, tokens: Tensor, cache: KVCache, step: Step, watch: Watch | None
) -> tuple[Tensor, StepOutput | None]:
    """Runs the candidates [B, K]; returns the directions [B, K, E] of their hidden states.

    And the output of all of them, where they ran side by side.
    """
    batch, count = tokens.shape
    if not plan.strategy.low_memory:
        rows = torch.arange(batch, device=tokens.device).repeat_interleave(count)
        output = step(tokens.reshape(-1, 1), cache, rows)
        hidden_states = output.hidden_states[: batch * count]  # [B x K, 1, E]
        return _directions(hidden_states).reshape(batch, count, -1), output

    def run(candidate: Tensor) -> Tensor:
        return _directions(step(candidate[:, None], cache).hidden_states[:batch, -1])  # [B, E]

    directions = torch.stack([run(candidate) for candidate in tokens.T], dim=1)
    if watch is not None:
        watch.forget(count)
    return directions, None


def rank(
    strategy: ContrastiveSearch, context: Tensor, directions: Tensor, probabilities: Tensor
) -> Tensor:
    """The best [B] of K candidates (arXiv:2202.06417, equation 5).

    Args:
        context: [B, S, E] of unit length.
        directions: [B, K, E] of unit length.
        probabilities: [B, K].
    """
    likeness = (context @ directions.transpose(1, 2)).amax(dim=1)  # [B, K]
    alpha = strategy.penalty_alpha
    return ((1 - alpha) * probabilities - alpha * likeness).argmax(dim=-1)


def of_best(plan: DecodePlan, output: StepOutput, best: Tensor, watch: Watch | None) -> StepOutput:
    """The output of the best [B] of K candidates each, and a cache in which all K copies hold it."""
    count = plan.strategy.top_k
    total = len(best) * count
    rows = torch.arange(len(best), device=best.device) * count + best  # [B]
    if watch is not None:
        watch.select(lambda x: x[rows])
    last, copies = output.cache.used - 1, in_halves(plan, rows.repeat_interleave(count), total)
    column = last + torch.zeros_like(rows[:1])  # [1]: a number would be asked of an accelerator

    def adopted(layer: LayerCache) -> LayerCache:
        key, value = (x[copies, :, column][:, :, None] for x in (layer.key, layer.value))
        return layer.extended(key, value, last)

    cache = replace(output.cache, layers=tuple(adopted(layer) for layer in output.cache.layers))
    rows = in_halves(plan, rows, total)
    return StepOutput(output.logits[rows], None, cache)


def _of_tokens(plan: DecodePlan, state: DecodeState) -> KVCache:
    """The cache of one copy of each row, without the last token, as other strategies leave it."""
    cache = state.cache
    if not plan.strategy.low_memory:
        count = plan.strategy.top_k
        rows = torch.arange(len(state.tokens), device=state.tokens.device) * count
        cache = cache.take(in_halves(plan, rows, len(state.tokens) * count))
    return replace(cache, length=cache.length - 1)


def _directions(hidden_states: Tensor) -> Tensor:
    """[..., E] of unit length, in float32."""
    return torch.nn.functional.normalize(hidden_states.float(), dim=-1)
