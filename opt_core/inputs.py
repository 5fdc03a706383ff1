# SPDX-License-Identifier: Apache-2.0
"""Checks of a model call's arguments, by their shapes alone; the same messages in all backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opt_core.config import OPTConfig
from opt_core.errors import InputError

#: A label that does not count.
IGNORED_LABEL = -100

Shape = Sequence[int | None]  # None: a dimension that is not known while tracing


@dataclass(frozen=True)
class PastShapes:
    """What is known of `past_key_values` without its values.

    Attributes:
        layers: of each layer the shapes of key and value; None where not even the rank is known.
        dtypes: theirs, as messages show them.
        is_fixed: whether the columns are room, of which the first `length` are in use.
        length: None without room, or if not known while tracing.
    """

    layers: tuple[tuple[Shape | None, Shape | None], ...]
    dtypes: tuple[tuple[Any, Any], ...]
    is_fixed: bool
    length: int | None

    @property
    def columns(self) -> int | None:
        """Those of each key and value, once `check_past` has seen them; None if not known."""
        shapes = (shape for pair in self.layers for shape in pair if shape is not None)
        return next((shape[2] for shape in shapes if shape[2] is not None), None)

    @property
    def used(self) -> int | None:
        """The columns in use; None if not known."""
        return self.length if self.is_fixed else self.columns


def check_call(
    config: OPTConfig,
    *,
    input_ids: Shape | None,
    inputs_embeds: Shape | None,
    attention_mask: Shape | None,
    position_ids: Shape | None,
    head_mask: Shape | None,
    past: PastShapes | None,
) -> None:
    """Checks that the arguments of a call fit each other and the model.

    Args:
        input_ids .. past: the arguments' shapes; None where not given.

    Raises:
        InputError: says what was expected and what was found.
    """
    if input_ids is not None and inputs_embeds is not None:
        raise InputError(
            "You cannot specify both decoder_input_ids and decoder_inputs_embeds at the same time "
            "(input_ids and inputs_embeds): give one of the two."
        )
    if input_ids is None and inputs_embeds is None:
        raise InputError(
            "You have to specify either decoder_input_ids or decoder_inputs_embeds "
            "(input_ids or inputs_embeds)."
        )
    if input_ids is not None:
        _check_rank("input_ids", input_ids, ("batch", "sequence"))
        batch, length = input_ids
    else:
        embeds = tuple(inputs_embeds or ())
        _check_rank("inputs_embeds", embeds, ("batch", "sequence", "word_embed_proj_dim"))
        batch, length, width = embeds
        if width is not None and width != config.word_embed_proj_dim:
            raise InputError(
                f"inputs_embeds: expected vectors of word_embed_proj_dim="
                f"{config.word_embed_proj_dim} numbers, found {width}."
            )
    if position_ids is not None:
        rows = 1 if len(position_ids) and position_ids[0] == 1 else batch  # one row serves all
        _check_equal("position_ids", position_ids, (rows, length))
    past_length: int | None = 0
    capacity: int | None = None
    if past is not None:
        check_past(config, past, batch)
        past_length, capacity = past.used, past.columns if past.is_fixed else None
    _check_lengths(config, length, past_length, capacity, position_ids is not None)
    if attention_mask is not None:
        _check_rank("attention_mask", attention_mask, ("batch", "sequence"))
        _check_mask(attention_mask, batch, length, past_length, capacity)
    if head_mask is not None:
        check_head_mask(config, head_mask)


def read_past(past: Any, as_array: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
    """The pairs of `past_key_values` as the reference has them, as arrays.

    Args:
        past: for each layer a pair (key, value), in sequences of any kind.
        as_array: makes an array of a framework; raises TypeError or ValueError where it cannot.

    Raises:
        InputError: names what is no pair, or no array.
    """
    expected = "past_key_values: expected for each layer a pair (key, value), or a KVCache"
    if isinstance(past, str | bytes | Mapping):
        raise InputError(f"{expected}; found {type(past).__name__}.")
    try:
        layers = [*past]
    except TypeError as error:
        raise InputError(f"{expected}; found {type(past).__name__}.") from error
    pairs = []
    for index, layer in enumerate(layers):
        if isinstance(layer, str | bytes | Mapping):
            raise InputError(f"{expected}; found {type(layer).__name__} for layer {index}.")
        try:
            pair = [*layer]
        except TypeError as error:
            found = type(layer).__name__
            raise InputError(f"{expected}; found {found} for layer {index}.") from error
        if len(pair) != 2:
            raise InputError(f"{expected}; found {len(pair)} values for layer {index}.")
        for part, (name, value) in enumerate(zip(("key", "value"), pair, strict=True)):
            try:
                pair[part] = as_array(value)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"past_key_values, {name} of layer {index}: expected an array [batch, heads, "
                    f"columns, head size], found {type(value).__name__} ({error})."
                ) from error
        pairs.append((pair[0], pair[1]))
    return pairs


def check_past(config: OPTConfig, past: PastShapes, batch: int | None) -> None:
    """Raises InputError unless every key and value fits the model, the inputs' rows and the others.

    Args:
        batch: the rows of the inputs; None if not known.
    """
    found = len(past.layers)
    if found != config.num_hidden_layers:
        raise InputError(
            f"past_key_values: expected {config.num_hidden_layers} layers, found {found}."
        )
    heads, size = config.num_attention_heads, config.head_dim
    expected: Shape = (batch, heads, None, size)
    floats: set[Any] = set()
    for index, (shapes, dtypes) in enumerate(zip(past.layers, past.dtypes, strict=True)):
        for name, shape, dtype in zip(("key", "value"), shapes, dtypes, strict=True):
            if dtype not in floats and "float" not in str(dtype):
                raise InputError(
                    f"past_key_values, {name} of layer {index}: expected floating-point numbers, "
                    f"found {dtype}."
                )
            floats.add(dtype)
            if shape is None or shape == expected:
                continue
            if len(shape) != 4 or _differ(shape, expected):
                rows, _, columns, _ = expected
                raise InputError(
                    f"past_key_values, {name} of layer {index}: expected the shape "
                    f"({'batch' if rows is None else rows}, {heads}, "
                    f"{'columns' if columns is None else columns}, {size}): a row for each of the "
                    f"inputs, num_attention_heads={heads}, as many columns as in each key and value, "
                    f"{size} numbers a head; found {tuple(shape)}."
                )
            if expected[2] is None:
                expected = (batch, heads, shape[2], size)
    columns = past.columns
    if past.length is not None and (
        past.length < 0 or (columns is not None and past.length > columns)
    ):
        raise InputError(
            f"past_key_values: expected a length from 0 to {columns}, the columns of the cache, found "
            f"{past.length}."
        )


def check_head_mask(config: OPTConfig, shape: Shape) -> None:
    """Raises InputError unless the head mask is [layers, heads]."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if len(shape) and shape[0] not in (None, layers):
        raise InputError(
            f"The `head_mask` should be specified for {layers} layers, but it is for {shape[0]}."
        )
    if len(shape) != 2 or shape[1] not in (None, heads):
        raise InputError(
            f"Head mask for a single layer should be of size ({heads},), but is {tuple(shape[1:])}"
        )


def check_labels(labels: Shape, logits: Shape) -> None:
    """Raises InputError unless there is one label for each token: [B, T] for logits [B, T, V]."""
    _check_equal("labels", labels, logits[:2])


def check_ids(smallest: int, largest: int, vocab_size: int, name: str = "input_ids") -> None:
    """Raises InputError if ids lie outside the vocabulary."""
    if smallest < 0 or largest >= vocab_size:
        raise InputError(
            f"{name} holds the token id {smallest if smallest < 0 else largest}, but the vocabulary "
            f"has the ids 0 to {vocab_size - 1}. Is the tokenizer that of another model?"
        )


def check_positions(smallest: int, largest: int, max_positions: int) -> None:
    """Raises InputError if explicit positions lie outside the position table; -1 stands for a pad."""
    if smallest < -1 or largest >= max_positions:
        raise InputError(
            f"position_ids holds {smallest if smallest < -1 else largest}, but the position table "
            f"has the positions 0 to {max_positions - 1} (and -1 for pads)."
        )


def read_numbers(name: str, value: Any) -> np.ndarray:
    """An argument that is no tensor yet as an array: numpy's, or rows of numbers.

    Raises:
        InputError: rows of unequal lengths, no numbers, or whole numbers that do not fit into 32 bits.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name}: expected a tensor, an array or rows of equal length, found "
            f"{type(value).__name__} ({error})."
        ) from error
    if array.dtype == object and array.size and all(isinstance(x, int) for x in array.flat):
        check_width(name, min(array.flat), max(array.flat))
    if array.dtype.kind in "OSU":
        raise InputError(f"{name}: expected numbers, found {type(value).__name__} of others.")
    if array.dtype.kind in "iu" and array.size:
        check_width(name, int(array.min()), int(array.max()))
    return array


def check_width(name: str, smallest: int, largest: int) -> None:
    """Raises InputError unless whole numbers fit into 32 bits, to which frameworks cut them unasked."""
    if smallest < -(2**31) or largest >= 2**31:
        raise InputError(
            f"{name} holds {largest if smallest >= -(2**31) else smallest}: expected whole numbers "
            "that fit into 32 bits, as ids, positions and masks do."
        )


def _check_rank(name: str, shape: Shape, dims: tuple[str, ...]) -> None:
    if len(shape) != len(dims):
        raise InputError(
            f"{name}: expected the dimensions ({', '.join(dims)}), found the shape {tuple(shape)}."
        )


def _check_equal(name: str, found: Shape, expected: Shape) -> None:
    if len(found) != len(expected) or _differ(found, expected):
        raise InputError(f"{name}: expected the shape {tuple(expected)}, found {tuple(found)}.")


def _differ(found: Shape, expected: Shape) -> bool:
    """Whether two shapes of a rank differ where both are known."""
    return any(
        f is not None and e is not None and f != e for f, e in zip(found, expected, strict=True)
    )


def _check_lengths(
    config: OPTConfig,
    length: int | None,
    past_length: int | None,
    capacity: int | None,
    explicit_positions: bool,
) -> None:
    if length is None or past_length is None:
        return
    total = past_length + length
    if total > config.max_position_embeddings and not explicit_positions:
        raise InputError(
            f"The sequence has {total} tokens, but the position table only "
            f"{config.max_position_embeddings} (max_position_embeddings). Shorten the input."
        )
    if capacity is not None and total > capacity:
        raise InputError(
            f"The cache has room for {capacity} tokens, but {past_length} are in it and {length} "
            "were given. Make a longer one with init_cache."
        )


def _check_mask(
    shape: Shape,
    batch: int | None,
    length: int | None,
    past_length: int | None,
    capacity: int | None,
) -> None:
    _check_equal("attention_mask (batch)", shape[:1], (batch,))
    found = shape[1]
    if found is None or found == capacity or length is None:
        return
    if past_length is None:
        if capacity is not None and found > capacity:
            raise InputError(
                f"The provided attention mask has length {found}, but the cache has room for only "
                f"{capacity} tokens."
            )
        return
    if found != past_length + length:
        raise InputError(
            f"The provided attention mask has length {found}, but its length should be "
            f"{past_length + length} (sum of the lengths of current and past inputs)"
        )
