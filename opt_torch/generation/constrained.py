# SPDX-License-Identifier: Apache-2.0
"""Beam search under constraints: the host decides which rows go on, `opt_core` how."""

from __future__ import annotations

from dataclasses import replace

import torch

from opt_core.generation.constrained import ConstrainedBeams
from opt_core.generation.plan import DecodePlan
from opt_core.generation.watching import Watch
from opt_torch.generation.decode import Noise, Step, in_halves, watched
from opt_torch.generation.processors import process
from opt_torch.generation.state import Decoded, DecodeState, sent


def constrained_beam_search(
    plan: DecodePlan, state: DecodeState, step: Step, noise: Noise | None, watch: Watch | None
) -> Decoded:
    """Continues the best rows of each prompt on their way to fulfil the constraints.

    A prompt ends when it has as many sequences as rows that no other can surpass, or when the host
    ends all of its rows. There is never any noise.
    """
    tokens, mask = (x[:, : plan.prompt_length].cpu().numpy() for x in (state.tokens, state.mask))
    beams = ConstrainedBeams(plan, tokens, mask, state.limit)
    state = shown(choose(plan, state, beams), beams, watch)
    while state.step < state.limit and not beams.finished.all():
        token = state.tokens[:, state.length - 1 : state.length]  # [B, 1]
        state = state.after(step(token, state.cache))
        state = shown(choose(plan, state, beams), beams, watch)
    found = (sent(x, state.tokens.device) for x in beams.found())
    sequences, scores, indices = found
    return Decoded(sequences.long(), sequences.shape[1], state.cache, scores, indices)


def choose(plan: DecodePlan, state: DecodeState, beams: ConstrainedBeams) -> DecodeState:
    """The state with one more column: the rows that go on; guides follow their rows."""
    logits = torch.log_softmax(state.logits.float(), -1)
    scores = process(plan.processors, logits, state)
    totals = scores + sent(beams.scores, scores.device)[:, None]  # [B, V]
    chosen = beams.choose(totals.cpu().numpy())
    rows, token = (sent(x, scores.device) for x in chosen)  # [B]
    cache = state.cache
    if cache is not None:
        cache = cache.take(in_halves(plan, rows, len(rows)))
    tokens = state.tokens[rows]
    tokens[:, state.length] = token
    return replace(state, tokens=tokens, length=state.length + 1, cache=cache, scores=totals)


def shown(state: DecodeState, beams: ConstrainedBeams, watch: Watch | None) -> DecodeState:
    """Shows a state with a new column to the host, which may end all rows of a prompt."""
    if watch is None:
        return state
    finished = sent(beams.finished, state.finished.device)
    state = watched(replace(state, finished=finished), watch)
    beams.stop(state.finished.cpu().numpy())
    return state
