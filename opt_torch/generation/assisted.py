# SPDX-License-Identifier: Apache-2.0
"""Assisted decoding and prompt lookup: several proposed tokens are checked in one call of the model.

The tokens are those of `search`: a proposal stays if it is what the model takes in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from opt_core.generation.lookup import look_up
from opt_core.generation.plan import DecodePlan
from opt_core.generation.watching import Watch
from opt_torch.cache import KVCache
from opt_torch.generation.decode import Noise, Step, in_halves, watched
from opt_torch.generation.search import choose
from opt_torch.generation.state import Decoded, DecodeState, sent

#: From a state and a number, at most so many tokens [1, any] that may come next.
Propose = Callable[[DecodeState, int], Tensor]


def assisted_search(
    plan: DecodePlan,
    state: DecodeState,
    step: Step,
    noise: Noise | None,
    watch: Watch | None,
    assistant: tuple[KVCache, Step] | None = None,
) -> Decoded:
    """Takes the tokens of `search`, one row after the other.

    Args:
        assistant: what a smaller model proposes with: its cache of the prompts, and its step. By
            default, proposals are looked up among the row's own tokens.
    """
    batch = len(state.tokens)
    if watch is not None:
        watch.check_rows(batch)
    found, rows = [], torch.arange(batch, device=state.tokens.device)
    for row in range(batch):
        index = rows[row : row + 1]
        cache_rows = in_halves(plan, index, batch)
        alone = replace(state.take(index), cache=state.cache.take(cache_rows))
        own_step, own_noise = partial(step, rows=index), _of_row(noise, row)
        if assistant is None:
            propose: Propose = partial(_look_up, plan)
        else:
            cache, draft = assistant
            propose = _drafts(plan, cache.take(cache_rows), partial(draft, rows=index), own_noise)
        found.append(_search_row(plan, alone, own_step, own_noise, watch, propose))
    tokens = torch.cat([state.tokens for state in found])[:, plan.prompt_length :]
    count = max(state.step for state in found)
    return Decoded(tokens, count, found[0].cache if batch == 1 else None)


def _search_row(
    plan: DecodePlan,
    state: DecodeState,
    step: Step,
    noise: Noise | None,
    watch: Watch | None,
    propose: Propose,
) -> DecodeState:
    """The state of one row at its end."""
    count = plan.strategy.num_tokens
    state = watched(choose(plan, state, noise), watch)
    ended = bool(state.finished.all())
    while state.step < state.limit and not ended:
        proposals = propose(state, min(count, state.limit - state.step - 1))
        state, accepted, ended = _check(plan, state, proposals, step, noise, watch)
        count = plan.strategy.next_count(count, accepted)
    return state


def _check(
    plan: DecodePlan,
    state: DecodeState,
    proposals: Tensor,
    step: Step,
    noise: Noise | None,
    watch: Watch | None,
) -> tuple[DecodeState, int, bool]:
    """Runs the last token and the proposals [1, any].

    The column after them is the model's own; the cache is cut back to the columns before it. Returns
    the state, how many were right, and whether the row has ended.
    """
    last = state.tokens[:, state.length - 1 : state.length]
    output = step(torch.cat([last, proposals], dim=1), state.cache)
    accepted = 0
    while True:
        logits = output.logits[:, accepted : accepted + 1]
        state = watched(choose(plan, state.after(output._replace(logits=logits)), noise), watch)
        newest = state.tokens[0, state.length - 1 : state.length]
        # An accelerator is asked once for all of it.
        token, ended, *expected = torch.cat([newest, state.finished, proposals[0]]).tolist()
        if ended or expected[accepted : accepted + 1] != [token]:
            break
        accepted += 1
    if watch is not None:
        watch.split(accepted + 1)
    return replace(state, cache=_cut(output.cache, state.length - 1)), accepted, bool(ended)


def _look_up(plan: DecodePlan, state: DecodeState, count: int) -> Tensor:
    """Proposals from the row's own tokens."""
    tokens = torch.where(state.mask == 1, state.tokens, -1)[0, : state.length].cpu().numpy()
    found = look_up(tokens[tokens >= 0], plan.strategy.lookup_size, count)
    return sent(found, state.tokens.device)[None]


def _drafts(plan: DecodePlan, cache: KVCache, step: Step, noise: Noise | None) -> Propose:
    """Proposals of an assistant: its own search, with the same processors and noise."""

    def propose(state: DecodeState, count: int) -> Tensor:
        nonlocal cache
        draft, start = replace(state, tokens=state.tokens.clone()), state.length
        cache = _cut(cache, min(int(cache.used), start - 1))  # what it holds of these tokens
        while draft.length < start + count and not bool(draft.finished.all()):
            tokens = draft.tokens[:, cache.used : draft.length]
            output = step(tokens, cache)
            draft, cache = choose(plan, draft.after(output), noise), output.cache
        return draft.tokens[:, start : draft.length]

    return propose


def _cut(cache: KVCache, length: int) -> KVCache:
    """The cache with its first columns alone in use."""
    return replace(cache, length=length)


def _of_row(noise: Noise | None, row: int) -> Noise | None:
    return None if noise is None else lambda index: noise(index)[row : row + 1]
