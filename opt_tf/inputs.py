# SPDX-License-Identifier: Apache-2.0
"""The three ways to hand inputs to a TensorFlow model, made one: keywords with tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opt_core import InputError, OPTConfig
from opt_core.inputs import (
    check_call,
    check_ids,
    check_positions,
    check_width,
    read_numbers,
)
from opt_tf.cache import KVCache
from opt_tf.parts import is_readable

#: What the elements of a list are, whatever class is called.
LIST_ORDER = ("input_ids", "attention_mask", "head_mask", "past_key_values", "inputs_embeds")
#: Arguments that are tensors; numpy arrays and nested lists become one.
TENSORS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "head_mask",
    "inputs_embeds",
    "labels",
    "start_positions",
    "end_positions",
)


def named_inputs(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, as tensors.

    The first argument may be a tensor of ids, a list or tuple in `LIST_ORDER`, or a dict; after it,
    arguments count as the signature says.

    Args:
        names: the arguments of the model's `call`, in order.

    Raises:
        InputError: an unknown or doubled name, too many elements, rows of unequal lengths.
    """
    first = args[0] if args else kwargs.pop("input_ids", None)
    given = dict(zip(names[1:], args[1:], strict=False))
    if len(args) > len(names):
        raise InputError(f"Expected at most {len(names)} arguments {[*names]}, found {len(args)}.")
    for more in (_unpack(first), kwargs):
        for name, value in more.items():
            if name not in names:
                raise InputError(
                    f"Unknown input {name!r}: OPT takes {', '.join(names)}. Remove it from the call."
                )
            if given.get(name) is not None:
                raise InputError(f"{name} was given twice.")
            given[name] = value
    return {
        name: _to_tensor(name, value) if name in TENSORS else value
        for name, value in given.items()
        if value is not None
    }


def _unpack(first: Any) -> Mapping[str, Any]:
    if isinstance(first, Mapping):
        return first
    if isinstance(first, list | tuple) and first and _holds_inputs(first):
        if len(first) > len(LIST_ORDER):
            raise InputError(
                f"A list of inputs holds at most {len(LIST_ORDER)}, in the order "
                f"{', '.join(LIST_ORDER)}; found {len(first)}. Use keywords or a dict."
            )
        return dict(zip(LIST_ORDER, first, strict=False))
    return {"input_ids": first}


def _holds_inputs(values: Sequence[Any]) -> bool:
    """Whether a list holds inputs, rather than being the ids [[1, 2], [3, 4]] themselves."""
    first = next((value for value in values if value is not None), None)
    if not isinstance(first, list | tuple):
        return not isinstance(first, int | np.integer)
    return bool(first) and isinstance(first[0], list | tuple)


def _to_tensor(name: str, value: Any) -> Any:
    if tf.is_tensor(value) or keras.utils.is_keras_tensor(value):
        return value
    return tf.convert_to_tensor(read_numbers(name, value))


def check_inputs(config: OPTConfig, inputs: Mapping[str, Any]) -> None:
    """Checks shapes, and values where they can be looked at.

    Raises:
        InputError: arguments that do not fit each other or the model.
    """
    past = inputs.get("past_key_values")
    input_ids, position_ids = inputs.get("input_ids"), inputs.get("position_ids")
    attention_mask = inputs.get("attention_mask")
    check_call(
        config,
        input_ids=_shape(input_ids),
        inputs_embeds=_shape(inputs.get("inputs_embeds")),
        attention_mask=_shape(attention_mask),
        position_ids=_shape(position_ids),
        head_mask=_shape(inputs.get("head_mask")),
        past=None if past is None else KVCache.from_pairs(past).shapes(),
    )
    # The values can be looked at only where that costs no synchronisation.
    if is_readable(input_ids):
        smallest, largest = tf.reduce_min(input_ids), tf.reduce_max(input_ids)
        check_ids(int(smallest), int(largest), config.vocab_size)
    if is_readable(position_ids):
        smallest, largest = tf.reduce_min(position_ids), tf.reduce_max(position_ids)
        check_positions(int(smallest), int(largest), config.max_position_embeddings)
    if is_readable(attention_mask) and attention_mask.dtype in (tf.int64, tf.uint64):
        smallest, largest = tf.reduce_min(attention_mask), tf.reduce_max(attention_mask)
        check_width("attention_mask", int(smallest), int(largest))


def _shape(value: Any) -> tuple[int | None, ...] | None:
    return None if value is None else tuple(value.shape)
