# SPDX-License-Identifier: Apache-2.0
"""The smallest parts, which Flax has but not quite as OPT needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from opt_core.params import Kind
from opt_flax.weights import initializer


class Linear(nn.Dense):
    """A linear layer that is one product of two matrices, and rounds to 16 bits once at its end.

    Activations are flattened to two dimensions: on CPU, XLA trains faster so, since the gradient of a
    product over [B, T, I] is slow.
    """

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """[..., I] -> [..., features]"""
        size, dtype = inputs.shape[-1], self.param_dtype
        kernel = self.param("kernel", self.kernel_init, (size, self.features), dtype)
        flat = inputs.astype(self.dtype).reshape(-1, size)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        outputs = jnp.dot(flat, kernel.astype(self.dtype), preferred_element_type=wide)
        if self.use_bias:
            outputs += self.param("bias", self.bias_init, (self.features,), dtype)
        return outputs.astype(self.dtype).reshape(*inputs.shape[:-1], self.features)


def linear(size: int, std: float, dtype: Any, param_dtype: Any, *, bias: bool) -> Linear:
    return Linear(
        size,
        use_bias=bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=initializer(Kind.LINEAR, std),
    )


def in_float32(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The function, computed in float32 at least and rounded once, as PyTorch's kernels do."""
    return lambda x: function(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


def is_readable(value: Any) -> bool:
    """Whether the values are at hand: not traced by a transformation, nor on an accelerator."""
    if isinstance(value, jax.core.Tracer):
        return False
    return not isinstance(value, jax.Array) or all(d.platform == "cpu" for d in value.devices())
