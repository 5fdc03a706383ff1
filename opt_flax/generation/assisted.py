# SPDX-License-Identifier: Apache-2.0
"""Assisted decoding and prompt lookup: several proposed tokens are checked in one call of the model.

The tokens are those of `search`: a proposal stays if it is what the model takes in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array

from opt_core.generation.lookup import look_up
from opt_core.generation.plan import DecodePlan
from opt_core.generation.strategies import PROPOSALS
from opt_core.generation.watching import Watch
from opt_flax.cache import KVCache
from opt_flax.generation.decode import Noise, Step, in_halves, watched
from opt_flax.generation.search import choose
from opt_flax.generation.state import Decoded, DecodeState

#: From a state and a number, at most so many tokens [1, any] that may come next.
Propose = Callable[[DecodeState, int], Array]


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
    found = []
    for row in range(batch):
        index = jnp.array([row])
        cache_rows = in_halves(plan, index, batch)
        alone = replace(state.take(index), cache=state.cache.take(cache_rows))
        own_step, own_noise = partial(step, rows=index), _of_row(noise, row)
        if assistant is None:
            propose: Propose = partial(_look_up, plan)
        else:
            cache, draft = assistant
            propose = _drafts(plan, cache.take(cache_rows), partial(draft, rows=index), own_noise)
        found.append(_search_row(plan, alone, own_step, own_noise, watch, propose))
    tokens = jnp.concatenate([state.tokens for state in found])[:, plan.prompt_length :]
    count = max(int(state.step) for state in found)
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
    while state.step < state.limit and not bool(state.finished.all()):
        proposals = propose(state, min(count, int(state.limit - state.step) - 1))
        state, accepted = _check(plan, state, proposals, step, noise, watch)
        count = plan.strategy.next_count(count, accepted)
    return state


def _check(
    plan: DecodePlan,
    state: DecodeState,
    proposals: Array,
    step: Step,
    noise: Noise | None,
    watch: Watch | None,
) -> tuple[DecodeState, int]:
    """Runs the last token and the proposals [1, any]; returns the state and how many were right.

    The column after them is the model's own; the cache is cut back to the columns before it.
    """
    last = np.asarray(state.tokens)[:, int(state.length) - 1 : int(state.length)]
    output = step(_filled(np.concatenate([last, proposals], axis=1)), state.cache)
    expected, accepted = proposals[0].tolist(), 0
    while True:
        logits = output.logits[:, accepted : accepted + 1]
        state = watched(choose(plan, state.after(output._replace(logits=logits)), noise), watch)
        token = np.asarray(state.tokens)[0, int(state.length) - 1]
        if bool(state.finished.all()) or expected[accepted : accepted + 1] != [token]:
            break
        accepted += 1
    if watch is not None:
        watch.split(accepted + 1)
    return replace(state, cache=_cut(output.cache, int(state.length) - 1)), accepted


def _look_up(plan: DecodePlan, state: DecodeState, count: int) -> Array:
    """Proposals from the row's own tokens."""
    tokens, mask = (np.asarray(x)[0, : int(state.length)] for x in (state.tokens, state.mask))
    found = look_up(tokens[mask == 1], plan.strategy.lookup_size, count)
    return found[None]


def _drafts(plan: DecodePlan, cache: KVCache, step: Step, noise: Noise | None) -> Propose:
    """Proposals of an assistant: its own search, with the same processors and noise."""

    def propose(state: DecodeState, count: int) -> Array:
        nonlocal cache
        draft, start = state, int(state.length)
        cache = _cut(cache, min(int(cache.used), start - 1))  # what it holds of these tokens
        while int(draft.length) < start + count and not bool(draft.finished.all()):
            tokens = np.asarray(draft.tokens)[:, int(cache.used) : int(draft.length)]
            output = step(tokens, cache)
            draft, cache = choose(plan, draft.after(output), noise), output.cache
        return np.asarray(draft.tokens)[:, start : int(draft.length)]

    return propose


def _cut(cache: KVCache, length: int) -> KVCache:
    """The cache with its first columns alone in use."""
    return replace(cache, length=jnp.asarray(length, jnp.int32))


def _of_row(noise: Noise | None, row: int) -> Noise | None:
    return None if noise is None else lambda index: noise(index)[row : row + 1]


def _filled(tokens: Array) -> Array:
    """The tokens [1, T], and what makes T - 1 a multiple of PROPOSALS."""
    more = -(tokens.shape[1] - 1) % PROPOSALS
    return np.pad(tokens, ((0, 0), (0, more)))
