# SPDX-License-Identifier: Apache-2.0
"""The activation functions by the names that a configuration may give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.nn as F
import jax.numpy as jnp
from jax import Array


def gelu(x: Array) -> Array:
    return F.gelu(x, approximate=False)


def gelu_accurate(x: Array) -> Array:
    """The tanh approximation with sqrt(2 / pi) and 0.044715 (arXiv 1606.08415)."""
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def laplace(x: Array) -> Array:
    """0.5 * (1 + erf((x - mu) / (sigma * sqrt(2)))), mu 0.707107, sigma 0.282095 (MEGA)."""
    return 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_10": lambda x: jnp.clip(gelu(x), -10, 10),
    "gelu_accurate": gelu_accurate,
    "gelu_fast": gelu_accurate,
    "gelu_new": gelu_accurate,
    "gelu_python": gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate=True),
    "laplace": laplace,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * F.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: jnp.square(F.relu(x)),
    "relu6": F.relu6,
    "sigmoid": F.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": jnp.tanh,
}
