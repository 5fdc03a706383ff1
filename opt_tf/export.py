# SPDX-License-Identifier: Apache-2.0
"""SavedModels: programs with their weights, which run without this package. They hold no caches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core.outputs import ModelOutput


def serving_output(output: ModelOutput) -> dict[str, Tensor]:
    """What a signature returns: tensors by name, those of all layers as one, and no cache."""
    return {
        name: tf.stack(value) if isinstance(value, tuple) else value
        for name, value in output.items()
        if name != "past_key_values"
    }


def serving_function(model: Any, dtype: tf.DType = tf.int32) -> Callable[..., dict[str, Tensor]]:
    """The model as a `tf.function` of one dict: token ids and their mask, of any batch and length."""
    signature = {
        name: tf.TensorSpec(spec.shape, dtype, name) for name, spec in model.input_signature.items()
    }

    def serving(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return serving_output(model(inputs, use_cache=False, return_dict=True, training=False))

    return tf.function(serving, input_signature=[signature], autograph=False)


def write_saved_model(model: Any, directory: str | os.PathLike[str], signatures: Any) -> None:
    """Writes the model under `signatures`, by default those of the reference: int32 and int64."""
    if signatures is None:
        signatures = {
            "serving_default": serving_function(model),
            "int64_serving": serving_function(model, tf.int64),
        }
    module = tf.Module()
    module.weights = [variable.value for variable in model.variables]
    tf.saved_model.save(module, Path(directory).as_posix(), signatures)


def export_saved_model(
    model: Any, path: str | os.PathLike[str], verbose: bool, input_signature: Any
) -> None:
    """Writes the model as Keras does: one function, `serve`, of the inputs of `input_signature`."""

    def serve(*inputs: Any) -> dict[str, Tensor]:
        return serving_output(model(*inputs, use_cache=False, return_dict=True, training=False))

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", serve, input_signature or [model.input_signature])
    archive.write_out(Path(path).as_posix(), verbose=verbose)
