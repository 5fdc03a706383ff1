# SPDX-License-Identifier: Apache-2.0
"""Keras' own quantization and LoRA, for a whole model: which layers, and back into plain weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from opt_core import InputError, UnsupportedError
from opt_tf.parts import Linear

#: The modes of Keras that look at nothing but a layer's weights.
MODES = ("int8", "int4", "float8")
#: Heads of a task, which start from nothing: LoRA leaves them to be trained in full.
TASK_HEADS = ("score", "qa_outputs")


def quantizable(model: Any, mode: str | None, filters: Any) -> Callable[[keras.layers.Layer], bool]:
    """Which layers are rounded: linear ones, and word embeddings that are no head as well.

    Args:
        filters: chooses among them as Keras does: pattern of a name, several, a function, or None.

    Raises:
        UnsupportedError: a mode that Keras calibrates by running single layers on single inputs.
    """
    if mode not in MODES:
        raise UnsupportedError(
            f"quantize({mode!r}): expected one of {', '.join(MODES)}. Methods that are calibrated on "
            "data need layers of one input, but a decoder layer takes the attention's mask too."
        )
    table = model.get_input_embeddings()
    spares_table = mode == "float8" or model.get_output_embeddings() is table
    patterns = [filters] if isinstance(filters, str) else filters

    def chosen(layer: keras.layers.Layer) -> bool:
        if not isinstance(layer, Linear) and (layer is not table or spares_table):
            return False
        if patterns is None or callable(patterns):
            return patterns is None or patterns(layer)
        return any(re.search(pattern, layer.name) for pattern in patterns)

    return chosen


def leaves(model: Any) -> Iterator[keras.layers.Layer]:
    """The layers that hold variables of their own."""
    for layer in model._flatten_layers(include_self=False):
        if len([*layer._flatten_layers()]) == 1:
            yield layer


def add_lora(model: Any, rank: int, lora_alpha: float | None, targets: Sequence[str]) -> None:
    """Freezes a model, and gives the linear layers of these names a product that learns.

    Raises:
        InputError: a rank below 1, a name that no linear layer has, or LoRA already there.
        UnsupportedError: float8 layers.
    """
    if rank < 1:
        raise InputError(f"enable_lora: expected a rank of at least 1, found {rank}.")
    names = {layer.name for layer in leaves(model) if isinstance(layer, Linear)} - {*TASK_HEADS}
    if unknown := {*targets} - names:
        raise InputError(
            f"enable_lora: no linear layer is named {sorted(unknown)}; expected some of "
            f"{sorted(names)}."
        )
    if any(layer.quantization_mode == "float8" for layer in leaves(model)):
        raise UnsupportedError(
            "enable_lora: Keras computes no LoRA beside float8; use int8 or int4."
        )
    if any(lora_leaf(layer) for layer in leaves(model)):
        raise InputError("enable_lora: the model has LoRA already, which happens once per model.")
    for layer in leaves(model):
        if layer.name in targets:
            layer.enable_lora(rank, lora_alpha)
            if layer.bias is not None:
                layer.bias.trainable = False
        elif layer.name not in TASK_HEADS:
            layer.trainable = False


def lora_leaf(layer: keras.layers.Layer) -> str | None:
    """The variable that LoRA adds to, if the layer has LoRA."""
    for kind, leaf in ((keras.layers.Dense, "kernel"), (keras.layers.Embedding, "embeddings")):
        if isinstance(layer, kind) and layer.lora_enabled:
            return leaf
    return None


def lora_product(layer: keras.layers.Layer) -> tf.Tensor:
    """What LoRA adds to `lora_leaf` of a layer that has it, [I, O] in float32."""
    names = [f"lora_{lora_leaf(layer)}_{side}" for side in "ab"]
    left, right = (
        tf.convert_to_tensor(next(v for v in layer.variables if v.name == name)) for name in names
    )
    return layer.lora_alpha / layer.lora_rank * tf.matmul(left, right)


def merge(adapted: Any, plain: Any) -> None:
    """Adds what LoRA has learnt in one model to the weights of another, which are not quantized."""
    for source, target in zip(leaves(adapted), leaves(plain), strict=True):
        if leaf := lora_leaf(source):
            variable = getattr(target, leaf)
            variable.assign_add(tf.cast(lora_product(source), variable.dtype))


def record(model: Any) -> dict[str, Any]:
    """The quantized layers by their place: mode, and Keras' configuration of it."""
    return {
        layer.path: [
            layer.quantization_mode,
            keras.saving.serialize_keras_object(layer.quantization_config),
        ]
        for layer in leaves(model)
        if layer.quantization_mode is not None
    }


def quantize_as(model: Any, recorded: Mapping[str, Any]) -> None:
    """Rounds the layers that `record` names, so that their variables can be read from a file."""
    for layer in leaves(model):
        if layer.path in recorded:
            mode, config = recorded[layer.path]
            config = keras.saving.deserialize_keras_object(config)
            layer.quantize(mode, config=config)
