# SPDX-License-Identifier: Apache-2.0
"""From the attention mask: each token's position, and which keys each query may see."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opt_torch.parts import is_concrete


class Bias(NamedTuple):
    """What is added to the scores of keys, and which queries may see none.

    These attend to all keys alike, in their gradient too: the kernels set such a query to 0.
    """

    values: Tensor  # [B or 1, 1, T, S] the lowest finite number at keys that are hidden; else 0
    blind: Tensor | None  # [B or 1, 1, T, 1]; None where each query sees itself


def positions_from_mask(
    attention_mask: Tensor, past_length: int | Tensor, query_length: int
) -> Tensor:
    """Each token's index among the real tokens of its row; -1 at pads.

    `modeling_opt.py:97-107` of the reference: cumsum(mask) * mask - 1, then the part beyond the past.

    Args:
        attention_mask: [B, S], 1 at real tokens and 0 at pads.

    Returns:
        [B, T] with T = query_length, from column `past_length` on, int64.
    """
    mask = attention_mask.long()
    positions = torch.cumsum(mask, dim=1) * mask - 1
    return positions[:, past_length + torch.arange(query_length, device=mask.device)]


def without_effect(attention_mask: Tensor) -> bool:
    """Whether all tokens are seen to be real, so that no kernel needs the mask."""
    return is_concrete(attention_mask) and bool((attention_mask == 1).all())


def packed_texts(position_ids: Tensor) -> Tensor | None:
    """Which of the texts packed into its row each token belongs to; None where that is seen to be one.

    A text begins at position 0, wherever pads (-1) stand; the first of a row is counted as 0.

    Args:
        position_ids: [B or 1, T].

    Returns:
        [B or 1, T].
    """
    tokens = (position_ids >= 0).cumsum(dim=1)
    begins = (position_ids == 0) & (tokens > 1)
    if is_concrete(begins) and not begins.any():
        return None
    return begins.cumsum(dim=1)


def attention_bias(
    attention_mask: Tensor | None,
    query_length: int,
    key_length: int,
    past_length: int | Tensor,
    dtype: torch.dtype,
    device: torch.device,
    texts: Tensor | None = None,
) -> Bias:
    """What hides from a query the keys behind it, pads, and other texts.

    The lowest finite number, not -inf: a row in which every key is masked stays finite.

    Args:
        attention_mask: [B, S], 1 at real tokens; None where all are real.
        texts: [B or 1, T], which text a token belongs to and sees; None where there is one in a row.
    """
    query = past_length + torch.arange(query_length, device=device)[:, None]  # [T, 1]
    key = torch.arange(key_length, device=device)  # [S]
    visible = (key <= query)[None, None]  # [1, 1, T, S]
    if attention_mask is not None:
        visible = visible & (attention_mask == 1)[:, None, None, :]  # [B, 1, T, S]
    if texts is not None:
        visible = visible & (texts[:, None, :, None] == texts[:, None, None, :])
    blind = None
    if attention_mask is not None:
        blind = ~visible.any(dim=-1, keepdim=True)
        visible = visible | blind
    bias = torch.zeros(visible.shape, dtype=dtype, device=device)
    return Bias(bias.masked_fill(~visible, torch.finfo(dtype).min), blind)
