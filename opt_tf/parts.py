# SPDX-License-Identifier: Apache-2.0
"""The smallest parts, which Keras has but not quite as OPT needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor


@keras.saving.register_keras_serializable("opt_tf")
class FirstValue(keras.initializers.Initializer):
    """A variable's first value, decided by `opt_tf.weights` between its declaration and its making."""

    def __init__(self) -> None:
        self.give: Callable[[tuple[int, ...], str], Any] | None = None

    def __call__(self, shape: tuple[int, ...], dtype: str = "float32") -> Any:
        return tf.zeros(shape, dtype) if self.give is None else self.give(shape, dtype)


class Linear(keras.layers.Dense):
    """A linear layer as a CPU computes it fastest, rounded to 16 bits once, at its end."""

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """[..., I] -> [..., units]"""
        if tf.config.list_logical_devices("GPU"):
            return super().call(inputs, training)
        # On CPU a product of float32 is also faster than one of 16 bits.
        wide = at_least_float32(inputs.dtype)
        outputs = keras.ops.matmul(tf.cast(inputs, wide), tf.cast(self.kernel, wide))
        if self.bias is not None:
            # A difference: XLA fuses a matrix-vector product with a sum, and runs it on one thread.
            outputs -= -tf.cast(self.bias, wide)
        return tf.cast(outputs, inputs.dtype)

    def quantize(self, mode: Any = None, type_check: bool = True, config: Any = None) -> None:
        super().quantize(mode, type_check=False, config=config)  # a subclass may be quantized too

    def load_own_variables(self, store: Any) -> None:
        """Keras' files hold LoRA merged into the kernel, and reading one sets both its factors to 0.

        They would never learn again: the first is drawn anew, as for a fresh adapter.
        """
        super().load_own_variables(store)
        if self.lora_enabled:
            factor = self.lora_kernel_a
            factor.assign(keras.initializers.HeUniform()(factor.shape, factor.dtype))


def linear(size: int, name: str, dtype: Any, *, bias: bool) -> Linear:
    return Linear(
        size,
        use_bias=bias,
        kernel_initializer=FirstValue(),
        bias_initializer=FirstValue(),
        name=name,
        dtype=dtype,
    )


def at_least_float32(dtype: tf.DType) -> tf.DType:
    return tf.float32 if dtype in (tf.float16, tf.bfloat16) else dtype


def in_float32(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function, rounded once: on 16 bits TensorFlow rounds after each of its operations."""

    def rounded_once(x: Tensor) -> Tensor:
        return tf.cast(function(tf.cast(x, at_least_float32(x.dtype))), x.dtype)

    return rounded_once


def dropout(x: Tensor, rate: float, seed: Tensor | None) -> Tensor:
    """Drops elements of x where there is a seed.

    The seed, int64 [2], is drawn by the caller: computing a layer a second time for its gradients
    then drops the same elements.
    """
    if seed is None or not rate:
        return x
    if rate == 1:
        return tf.zeros_like(x)
    # By name: what XLA would choose takes many times as long on a CPU.
    return tf.nn.experimental.stateless_dropout(x, rate, seed, rng_alg="philox")


def split_seed(seed: Tensor | None, number: int) -> list[Tensor | None]:
    """Independent seeds for `number` parts; None for each where there is none."""
    if seed is None:
        return [None] * number
    return [tf.random.experimental.stateless_fold_in(seed, part) for part in range(number)]


def recomputed(layer: Callable[..., Any], hidden_states: Tensor, **arguments: Any) -> Any:
    """What a decoder layer returns, less its cache; its gradients compute it again.

    Its seed is an argument, so the same elements are dropped both times. Gradients reach what is
    handed to `tf.recompute_grad`: the variables and its own arguments, the layer's floating-point
    inputs but for the bias, which has none.
    """
    names = [name for name in ("head_mask", "past") if arguments[name] is not None]

    @tf.recompute_grad
    def run(hidden_states: Tensor, *inputs: Any) -> list[Tensor]:
        output, weights, _ = layer(
            hidden_states, **{**arguments, **dict(zip(names, inputs, strict=True))}
        )
        return [output] if weights is None else [output, weights]

    output, *weights = run(hidden_states, *(arguments[name] for name in names))
    return output, weights[0] if weights else None, None


def existing_rows(vectors: Tensor, rows: Tensor, count: int) -> Tensor:
    """The vectors that were looked up; in a graph, NaN where a table of `count` rows has no such row.

    Compiled code cannot raise, and would read another row instead.
    """
    if tf.executing_eagerly():
        return vectors
    exists = (rows >= 0) & (rows < count)
    return tf.where(exists[..., None], vectors, tf.constant(float("nan"), vectors.dtype))


def still_pads(vectors: Tensor, ids: Tensor, pad_token_id: int | None) -> Tensor:
    """The vectors [B, T, E] that were looked up; looking up a pad moves its row by no gradient."""
    if pad_token_id is None:
        return vectors
    return tf.where((ids == pad_token_id)[..., None], tf.stop_gradient(vectors), vectors)


def known_shape(value: Tensor) -> tuple[int | None, ...] | None:
    """The shape, with None for what a graph does not know: a length, or all of it."""
    return None if value.shape.rank is None else tuple(value.shape)


def is_readable(value: Any) -> bool:
    """Whether the values lie in the CPU's memory, now."""
    if not tf.is_tensor(value) or not tf.executing_eagerly() or 0 in value.shape:
        return False
    return "CPU" in value.device
