# SPDX-License-Identifier: Apache-2.0
"""DoLa: logits that say what the late layers know and the early ones do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opt_core.generation.dola import RELATIVE_TOP


def early_logits(model: Any, hidden_states: Sequence[Tensor]) -> list[Tensor]:
    """What the head makes [B, T, V] of each layer's hidden states [B, T, D], without a final norm."""
    project = model.model.decoder.project_out
    return [model.lm_head(x if project is None else project(x)) for x in hidden_states]


def contrasted(logits: Tensor, early: Sequence[Tensor]) -> Tensor:
    """Log-probabilities [B, T, V], less those of the early layer that is most unlike them.

    `_dola_select_contrast` of transformers from 4.45 on, for each row as if it were alone.
    """
    late = torch.log_softmax(logits.float(), dim=-1)
    layers = torch.log_softmax(torch.stack(list(early)).float(), dim=-1)  # [L, B, T, V]
    mean = torch.logaddexp(late, layers) - math.log(2)
    divergence = torch.sum(torch.exp(mean) * (2 * mean - late - layers), dim=-1)  # [L, B, T]
    chosen = torch.argmax(divergence, dim=0)[None, :, :, None]
    base = torch.take_along_dim(layers, chosen, dim=0)[0]
    lowest = torch.amax(late, dim=-1, keepdim=True) + math.log(RELATIVE_TOP)
    return torch.where(late < lowest, -torch.inf, late - base)
