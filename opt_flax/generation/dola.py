# SPDX-License-Identifier: Apache-2.0
"""DoLa: logits that say what the late layers know and the early ones do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from opt_core.generation.dola import RELATIVE_TOP


def early_logits(model: Any, hidden_states: Sequence[Array]) -> list[Array]:
    """What the head makes [B, T, V] of each layer's hidden states [B, T, D], without a final norm."""
    project = model.model.decoder.project_out
    return [model.logits(x if project is None else project(x)) for x in hidden_states]


def contrasted(logits: Array, early: Sequence[Array]) -> Array:
    """Log-probabilities [B, T, V], less those of the early layer that is most unlike them.

    `_dola_select_contrast` of transformers from 4.45 on, for each row as if it were alone.
    """
    late = jax.nn.log_softmax(logits.astype(jnp.float32))
    layers = jax.nn.log_softmax(jnp.stack(early).astype(jnp.float32))  # [L, B, T, V]
    mean = jnp.logaddexp(late, layers) - math.log(2)
    divergence = jnp.sum(jnp.exp(mean) * (2 * mean - late - layers), axis=-1)  # [L, B, T]
    chosen = jnp.argmax(divergence, axis=0)[None, :, :, None]
    base = jnp.take_along_axis(layers, chosen, axis=0)[0]
    lowest = jnp.max(late, axis=-1, keepdims=True) + math.log(RELATIVE_TOP)
    return jnp.where(late < lowest, -jnp.inf, late - base)
