# SPDX-License-Identifier: Apache-2.0
"""The smallest parts, which Flax has but not quite as OPT needs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope
from flax.linen.dtypes import promote_dtype
from jax import Array

from opt_core.inputs import read_numbers
from opt_core.params import Kind
from opt_flax.decoding_weights import DECODING_LEAF
from opt_flax.weights import initializer

#: A matrix that multiplies one row is cut into so many blocks, if its size allows.
BLOCKS = 16
#: Up to so many rows a product is faster with the matrix on its left.
FEW_ROWS = 16


class Linear(nn.Dense):
    """A linear layer that is one product of two matrices, and rounds to 16 bits once at its end.

    Activations are flattened to two dimensions: on CPU, XLA trains faster so, since the gradient of a
    product over [B, T, I] is slow. The matrix is `kernel` [I, O], or [O, I] after
    `prepare_for_decoding`.
    """

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """[..., I] -> [..., features]"""
        size, dtype = inputs.shape[-1], self.param_dtype
        flat = inputs.astype(self.dtype).reshape(-1, size)
        if self.has_variable("params", DECODING_LEAF):
            weight = self.get_variable("params", DECODING_LEAF)
            outputs = weight_product(flat, weight.astype(self.dtype))
        else:
            kernel = self.param("kernel", self.kernel_init, (size, self.features), dtype)
            flat, kernel = promote_dtype(flat, kernel, dtype=self.dtype)
            outputs = (kernel_product if _is_plain(self) else whole_product)(flat, kernel)
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


class Embed(nn.Embed):
    """A table of embeddings, which is also the weight of a tied head."""

    def attend(self, query: Array) -> Array:
        """[R, E] -> [R, V], the products with all rows of the table."""
        outputs = weight_product(query.astype(self.dtype), self.embedding.astype(self.dtype))
        return outputs.astype(self.dtype)


def _is_plain(module: nn.Module) -> bool:
    """Whether the parameters are a matrix and a bias alone, and there already.

    A library such as qwix puts its own beside them, or others in their place. It does so wherever a
    parameter meets `jnp.dot`, but does not know a parameter that was cut into blocks.
    """
    leaves = module.variables.get("params", {})
    return not module.is_initializing() and all(
        name in ("kernel", "bias") and isinstance(leaf, jax.Array) for name, leaf in leaves.items()
    )


def whole_product(rows: Array, kernel: Array) -> Array:
    """Rows [R, I] times a kernel [I, O] -> [R, O], summed in float32 at least."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.dot(rows, kernel, preferred_element_type=wide)


def kernel_product(rows: Array, kernel: Array) -> Array:
    """As `whole_product`.

    On CPU, XLA multiplies one row by the blocks of a matrix in parallel and at the speed of memory,
    and by the matrix as a whole at about 0.7 of it.
    """
    wide = jnp.promote_types(rows.dtype, jnp.float32)

    def in_blocks(rows: Array, kernel: Array) -> Array:
        blocks = kernel.reshape(math.gcd(len(kernel), BLOCKS), -1, kernel.shape[1])
        parts = rows.reshape(len(blocks), -1)
        products = jnp.einsum("ki,kio->ko", parts, blocks, preferred_element_type=wide)
        return products.sum(axis=0, keepdims=True)

    if len(rows) != 1 or _has_16_bits(rows):
        return whole_product(rows, kernel)
    return jax.lax.platform_dependent(rows, kernel, cpu=in_blocks, default=whole_product)


def weight_product(rows: Array, weight: Array) -> Array:
    """Rows [R, I] times the transpose of a weight [O, I] -> [R, O], summed in float32 at least.

    On CPU, XLA is at its fastest if one row meets the blocks of the weight (see `kernel_product`), and
    a few rows stand to its right: it then reads the weight in place, where else it repacks it.
    """
    wide = jnp.promote_types(rows.dtype, jnp.float32)

    def whole(rows: Array, weight: Array) -> Array:
        return jnp.einsum("ri,oi->ro", rows, weight, preferred_element_type=wide)

    def in_blocks(rows: Array, weight: Array) -> Array:
        blocks = weight.reshape(math.gcd(len(weight), BLOCKS), -1, weight.shape[1])
        parts = jnp.broadcast_to(rows[0], (len(blocks), rows.shape[1]))
        products = jnp.einsum("ki,koi->ko", parts, blocks, preferred_element_type=wide)
        return products.reshape(1, -1)

    def on_the_left(rows: Array, weight: Array) -> Array:
        # The barriers keep XLA from swapping the sides again.
        columns = jax.lax.optimization_barrier(rows.T)  # [I, R]
        products = jnp.dot(weight, columns, preferred_element_type=wide)
        return jax.lax.optimization_barrier(products).T

    if len(rows) > FEW_ROWS or _has_16_bits(rows):
        return whole(rows, weight)
    few = in_blocks if len(rows) == 1 else on_the_left
    return jax.lax.platform_dependent(rows, weight, cpu=few, default=whole)


def _has_16_bits(x: Array) -> bool:
    """For which XLA's products on CPU are others, and gain nothing from another order."""
    return x.dtype.itemsize < 4


def recomputed(layer: nn.Module, hidden_states: Array, *arguments: Any) -> Any:
    """Calls a layer, which computes anew for its gradients what it does not get as an argument.

    `nn.remat` does so too, but frees nothing on a CPU: XLA may compute a layer again as soon as its
    input is there, and there computes all of them before it needs the first.

    Args:
        layer: bound to its parameters; its first argument and first result are hidden states.
    """
    module, variables = layer.unbind()
    leaves, structure = jax.tree.flatten(arguments)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
    others = [None if i in arrays else leaf for i, leaf in enumerate(leaves)]

    def run(variables: Any, rngs: Any, hidden_states: Array, arrays: Any) -> Any:
        given = [arrays.get(i, other) for i, other in enumerate(others)]
        bound = module.clone(parent=Scope(variables, rngs, path=layer.path))
        return bound(hidden_states, *structure.unflatten(given))

    inputs = variables, layer.scope.rngs, hidden_states, arrays
    # Traced once: a library that replaces functions here, such as qwix, does not do so again later.
    traced, constants = jax.closure_convert(run, *inputs)

    def run_again(inputs: tuple[Any, ...], gradients: Any) -> tuple[Any, ...]:
        variables, rngs, hidden_states, *others = inputs
        # The sum waits for the gradient, of which XLA cannot know that it adds nothing.
        nothing = 0 * jnp.nan_to_num(gradients[0][..., :1])
        return jax.vjp(traced, variables, rngs, hidden_states + nothing, *others)[1](gradients)

    call = jax.custom_vjp(traced)
    call.defvjp(lambda *inputs: (traced(*inputs), inputs), run_again)
    return call(*inputs, *constants)


def in_float32(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The function, computed in float32 at least and rounded once, as PyTorch's kernels do."""
    return lambda x: function(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


def still_pads(vectors: Array, ids: Array, pad_token_id: int | None) -> Array:
    """The vectors [B, T, E] that were looked up; looking up a pad moves its row by no gradient."""
    if pad_token_id is None:
        return vectors
    return jnp.where((ids == pad_token_id)[..., None], jax.lax.stop_gradient(vectors), vectors)


def to_array(name: str, value: Any) -> Array:
    """An argument of a call as an array of JAX, which would cut whole numbers to 32 bits unasked.

    Raises:
        InputError: see `opt_core.inputs.read_numbers`.
    """
    is_array = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
    return jnp.asarray(value if is_array else read_numbers(name, value))


def is_readable(value: Any) -> bool:
    """Whether the values are at hand: not traced by a transformation, nor on an accelerator."""
    if isinstance(value, jax.core.Tracer):
        return False
    return not isinstance(value, jax.Array) or all(d.platform == "cpu" for d in value.devices())
