# SPDX-License-Identifier: Apache-2.0
"""The score of each generated token, looked up in the scores of the steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import InputError


def transition_scores(
    sequences: NDArray[np.integer],
    scores: Sequence[NDArray[np.floating]],
    beam_indices: NDArray[np.integer] | None = None,
    normalize_logits: bool = False,
) -> NDArray[np.floating]:
    """The scores that the tokens of `generate`'s sequences had when they were chosen.

    `generation/utils.py:compute_transition_scores` of the reference.

    Args:
        sequences: [B, T + new], whose last columns are the new tokens.
        scores: [rows, V] for each step.
        beam_indices: [B, new], the row of each token, -1 after the end; without beams, None.
        normalize_logits: whether the scores are turned into log-probabilities first.

    Returns:
        [B, new]; 0 where `beam_indices` is -1.

    Raises:
        InputError: no scores, or fewer of them than there are steps.
    """
    if not scores:
        raise InputError(
            "There are no scores: generate(..., output_scores=True, return_dict_in_generate=True)."
        )
    table = np.stack(scores)  # [steps, rows, V]
    if normalize_logits:
        shifted = table - table.max(axis=-1, keepdims=True)
        table = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    rows: NDArray[np.integer]
    if beam_indices is None:
        rows = np.broadcast_to(np.arange(len(sequences))[:, None], (len(sequences), len(table)))
    else:
        longest = int((beam_indices >= 0).sum(axis=1).max())
        rows = beam_indices[:, :longest]
    count = rows.shape[1]
    if count > len(table):
        raise InputError(f"scores: expected those of {count} steps, found {len(table)}.")
    tokens = sequences[:, sequences.shape[1] - count :]
    found = table[np.arange(count), np.maximum(rows, 0), tokens]  # [B, new]
    return np.asarray(np.where(rows >= 0, found, 0), found.dtype)
