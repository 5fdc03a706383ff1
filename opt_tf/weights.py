# SPDX-License-Identifier: Apache-2.0
"""Between the parameter table and the layers: initial values, assigning, reading back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial

import keras
import numpy as np
import tensorflow as tf

from opt_core import InputError, OPTConfig, UnsupportedError
from opt_core.dtypes import MODEL_DTYPES
from opt_core.loading import Source
from opt_core.params import EMBEDDING_NAME, Kind, Param, param_table
from opt_tf.adapters import lora_leaf, lora_product
from opt_tf.parts import FirstValue

INITIAL_VALUES: Mapping[Kind, Callable[[tuple[int, ...], float], tf.Tensor]] = {
    Kind.LINEAR: lambda shape, std: keras.random.normal(shape, 0.0, std, "float32"),
    Kind.BIAS: lambda shape, std: tf.zeros(shape),
    Kind.EMBEDDING: lambda shape, std: keras.random.normal(shape, 0.0, std, "float32"),
    Kind.NORM_SCALE: lambda shape, std: tf.ones(shape),
    Kind.NORM_BIAS: lambda shape, std: tf.zeros(shape),
}


def find_parameter(
    model: keras.Model, param: Param, architecture: str
) -> tuple[keras.layers.Layer, str]:
    """The layer that owns the parameter, and the parameter's name there."""
    *parents, leaf = param.path("tf", architecture)
    owner = model
    for name in parents:
        owner = owner[int(name)] if name.isdigit() else getattr(owner, name)
    return owner, leaf


def initialize(model: keras.Model, config: OPTConfig, params: tuple[Param, ...], arch: str) -> None:
    """Draws N(0, init_std) for matrices, zeros biases and the pad row, sets norms to one.

    `modeling_opt.py:626-635` of the reference. The values are drawn when the variables are made.
    """

    def draw(param: Param, shape: tuple[int, ...], dtype: str) -> tf.Tensor:
        value = INITIAL_VALUES[param.spec.kind](shape, config.init_std)
        if param.name == EMBEDDING_NAME and config.pad_token_id is not None:
            is_pad = tf.range(config.vocab_size)[:, None] == config.pad_token_id
            value = tf.where(is_pad, 0.0, value)
        return tf.cast(value, dtype)

    for param in params:
        layer, leaf = find_parameter(model, param, arch)
        getattr(layer, f"{leaf}_initializer").give = partial(draw, param)


def assign(model: keras.Model, config: OPTConfig, arch: str, sources: Mapping[str, Source]) -> None:
    """Lets the variables of a model be made of the checkpoint's tensors, read one at a time."""

    def read(source: Source, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return source.read("tf").astype(MODEL_DTYPES[dtype], copy=False)

    for param in param_table(config, arch):
        if param.name in sources:
            layer, leaf = find_parameter(model, param, arch)
            getattr(layer, f"{leaf}_initializer").give = partial(read, sources[param.name])


def resized(layer: keras.layers.Layer, size: int, std: float) -> keras.layers.Layer:
    """A layer like this one, with weights [size, E]: the first rows, then as many as are missing.

    Raises:
        UnsupportedError: its weights are not what it computes with alone: int8, LoRA.
    """
    if layer.quantization_mode is not None or layer.lora_enabled:
        raise UnsupportedError(
            f"{layer.path} has {layer.quantization_mode or 'LoRA'} weights, which cannot be resized. "
            "Resize the embeddings before."
        )
    is_table = isinstance(layer, keras.layers.Embedding)
    count, leaf = ("input_dim", "embeddings") if is_table else ("units", "kernel")
    config = {**layer.get_config(), count: size, f"{leaf}_initializer": FirstValue()}
    new = type(layer).from_config(config)
    old = tf.convert_to_tensor(getattr(layer, leaf))
    old = old if is_table else tf.transpose(old)  # [V, E]
    missing = max(size - old.shape[0], 0)
    drawn = INITIAL_VALUES[Kind.EMBEDDING]((missing, old.shape[1]), std)
    rows = tf.concat([old[:size], tf.cast(drawn, old.dtype)], axis=0)
    with ExitStack() as place:
        for part in layer.path.split("/")[:-1]:
            place.enter_context(keras.name_scope(part))
        new.build((None, old.shape[1]))
    getattr(new, leaf).assign(rows if is_table else tf.transpose(rows))
    return new


def to_numpy(variable: keras.Variable | tf.Tensor, transposed: bool) -> np.ndarray:
    """The values in canonical layout."""
    array = tf.convert_to_tensor(variable).numpy()
    return np.ascontiguousarray(array.T) if transposed else array


def canonical_arrays(
    model: keras.Model, config: OPTConfig, arch: str
) -> Iterator[tuple[Param, np.dtype, Callable[[], np.ndarray]]]:
    """Each row of the table, its dtype in the model, and a function that reads its values.

    Raises:
        InputError: the configuration asks for a head of its own, which was not set.
        UnsupportedError: quantized layers, whose integers are not the parameters; layers beyond the
            table.
    """
    _refuse_added(model, config, arch)
    for param in param_table(config, arch):
        layer, leaf = find_parameter(model, param, arch)
        if layer is None:
            raise InputError(
                f"{param.name} does not exist: the head is the word embedding, but "
                "config.tie_word_embeddings is False. Set it to True, or give the model a head by "
                "set_output_embeddings."
            )
        if layer.quantization_mode is not None:
            raise UnsupportedError(
                f"{param.name} is quantized ({layer.quantization_mode}), which no OPT checkpoint can "
                "hold. Save before quantizing, or use model.save for a Keras file."
            )
        variable = next(v for v in layer.variables if v.name == leaf)
        dtype = MODEL_DTYPES[keras.backend.standardize_dtype(variable.dtype)]
        yield param, dtype, partial(_merged, layer, variable, param.transposed("tf"))


def _refuse_added(model: keras.Model, config: OPTConfig, arch: str) -> None:
    """Raises UnsupportedError for variables that no row of the table stands for: they would be lost."""
    own: set[int] = set()
    for param in param_table(config, arch):
        layer, leaf = find_parameter(model, param, arch)
        if layer is not None:
            changed = layer.quantization_mode is not None or lora_leaf(layer) is not None
            own.update(id(v) for v in layer.variables if changed or v.name == leaf)
    added = [variable.path for variable in model.weights if id(variable) not in own]
    if added:
        raise UnsupportedError(
            f"{', '.join(added)}: expected layers of an OPT model alone, found others, for which a "
            "checkpoint has no place. Save the model with model.save('model.keras')."
        )


def _merged(layer: keras.layers.Layer, variable: keras.Variable, transposed: bool) -> np.ndarray:
    """A variable in canonical layout, with what LoRA adds to it; Keras' own sum is rounded."""
    value = tf.convert_to_tensor(variable)
    if lora_leaf(layer) == variable.name:
        product = lora_product(layer)
        value = tf.cast(tf.cast(value, product.dtype) + product, value.dtype)
    return to_numpy(value, transposed)
