# SPDX-License-Identifier: Apache-2.0
"""The activation functions by the names that a configuration may give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import tensorflow as tf
from tensorflow import Tensor


def gelu_accurate(x: Tensor) -> Tensor:
    """The tanh approximation with sqrt(2 / pi) and 0.044715 (arXiv 1606.08415)."""
    return 0.5 * x * (1 + tf.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x: Tensor) -> Tensor:
    return tf.nn.gelu(x, approximate=False)


def laplace(x: Tensor) -> Tensor:
    """0.5 * (1 + erf((x - mu) / (sigma * sqrt(2)))), mu 0.707107, sigma 0.282095 (MEGA)."""
    return 0.5 * (1 + tf.math.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_10": lambda x: tf.clip_by_value(gelu(x), -10, 10),
    "gelu_accurate": gelu_accurate,
    "gelu_fast": gelu_accurate,
    "gelu_new": gelu_accurate,
    "gelu_python": gelu,
    "gelu_pytorch_tanh": lambda x: tf.nn.gelu(x, approximate=True),
    "laplace": laplace,
    "leaky_relu": lambda x: tf.nn.leaky_relu(x, 0.01),
    "linear": lambda x: x,
    "mish": lambda x: x * tf.tanh(tf.math.softplus(x)),
    "quick_gelu": lambda x: x * tf.sigmoid(1.702 * x),
    "relu": tf.nn.relu,
    "relu2": lambda x: tf.square(tf.nn.relu(x)),
    "relu6": tf.nn.relu6,
    "sigmoid": tf.sigmoid,
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
}
