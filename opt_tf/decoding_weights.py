# SPDX-License-Identifier: Apache-2.0
"""Linear weights laid out for decoding, which reads each of them once per token.

Exact weights stay as they are: XLA reads them in either order, with all threads (`parts.Linear`).
Only rounding them is left to do.
"""

from __future__ import annotations

from typing import Any

import keras

from opt_core import InputError
from opt_tf.parts import Linear


def prepare(model: Any, batch_size: int, weights: str | None) -> None:
    """Rounds the weights as `TFOPTPreTrainedModel.prepare_for_decoding` says."""
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1, found {batch_size}.")
    if weights not in (None, "int8"):
        raise InputError(f"weights: expected None or 'int8', found {weights!r}.")
    if weights is None:
        return
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, Linear) and layer.quantization_mode is None:
            layer.quantize("int8", config=_weights_alone())


def _weights_alone() -> keras.quantizers.QuantizationConfig:
    """Without a quantizer of activations, Keras multiplies them as they are."""
    return keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
