# SPDX-License-Identifier: Apache-2.0
"""The keys and values of past tokens: an explicit value, passed in and handed back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core.inputs import PastShapes, read_past
from opt_tf.parts import known_shape


class LayerCache(NamedTuple):
    """One layer's keys and values, each [B, N, S, H]: what a head reads lies together."""

    key: Tensor
    value: Tensor

    def extended(self, key: Tensor, value: Tensor, length: int | Tensor | None) -> LayerCache:
        """The cache with T more columns: appended, or written at column `length` of the buffers.

        A cache of another dtype becomes one of the computation's.
        """
        past = self.to(key.dtype)
        if length is None:
            return LayerCache(
                tf.concat([past.key, key], axis=2), tf.concat([past.value, value], axis=2)
            )
        start = (0, 0, length, 0)
        return LayerCache(
            keras.ops.slice_update(past.key, start, key),
            keras.ops.slice_update(past.value, start, value),
        )

    def to(self, dtype: tf.DType) -> LayerCache:
        """The cache in that dtype; itself where it is."""
        return LayerCache(tf.cast(self.key, dtype), tf.cast(self.value, dtype))


@dataclass(frozen=True, eq=False)
class KVCache:
    """The cache of all layers.

    A *growing* cache (`length` None) has just the columns in use, and is copied at each extension.
    A *fixed* cache has buffers for a maximal length, of which the first `length` columns are in use;
    `length` is an int, or an int32 scalar where it changes within a compiled loop. As a sequence, a
    cache is the reference's `past_key_values`: per layer a pair (key, value), of the columns in use.
    """

    layers: tuple[LayerCache, ...]
    length: int | Tensor | None = None

    @classmethod
    def fixed(
        cls, num_layers: int, shape: tuple[int, int, int, int], dtype: tf.DType | str
    ) -> KVCache:
        """Empty buffers of `shape` [B, N, S, H] for every layer."""
        layers = tuple(
            LayerCache(tf.zeros(shape, dtype), tf.zeros(shape, dtype)) for _ in range(num_layers)
        )
        return cls(layers, 0)

    @classmethod
    def from_pairs(cls, pairs: Any) -> KVCache:
        """A growing cache from the reference's tuples, or the cache itself where it is one.

        Raises:
            InputError: not for each layer a pair.
        """
        if isinstance(pairs, KVCache):
            return pairs
        return cls(tuple(LayerCache(*pair) for pair in read_past(pairs, tf.convert_to_tensor)))

    def advanced(self, layers: tuple[LayerCache, ...], length: int | Tensor) -> KVCache:
        """This cache with the layers after `length` more tokens."""
        return KVCache(layers, None if self.length is None else self.length + length)

    def with_capacity(self, capacity: int, before: int = 0) -> KVCache:
        """The columns in use as a fixed cache of `capacity` columns, with `before` empty ones first."""
        room = ((0, 0), (0, 0), (before, capacity - before - self.used), (0, 0))
        layers = tuple(
            LayerCache(*(tf.pad(x[:, :, : self.used], room) for x in layer))
            for layer in self.layers
        )
        return KVCache(layers, before + self.used)

    def take(self, rows: Tensor) -> KVCache:
        """The cache of some rows [B]."""
        layers = tuple(LayerCache(*(tf.gather(x, rows) for x in layer)) for layer in self.layers)
        return KVCache(layers, self.length)

    def shapes(self) -> PastShapes:
        """What is known without looking at keys and values."""
        length = None if self.length is None else self.used
        return PastShapes(
            tuple((known_shape(layer.key), known_shape(layer.value)) for layer in self.layers),
            tuple((layer.key.dtype, layer.value.dtype) for layer in self.layers),
            self.length is not None,
            length if isinstance(length, int) else None,
        )

    @property
    def capacity(self) -> int | Tensor:
        return keras.ops.shape(self.layers[0].key)[2] if self.layers else 0

    @property
    def used(self) -> int | Tensor:
        """The number of columns in use: an int wherever it is known."""
        if self.length is None:
            return self.capacity
        static = tf.get_static_value(self.length)
        return self.length if static is None else int(static)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self)[index]
        layer = self.layers[index]
        return layer.key[:, :, : self.used], layer.value[:, :, : self.used]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))

    def __tf_flatten__(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """A length that is a tensor varies; an int or None belongs to the structure."""
        if isinstance(self.length, int | None):
            return (self.length,), (self.layers,)
        return (), (self.layers, self.length)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[Any, ...], components: tuple[Any, ...]) -> KVCache:
        return cls(*components, *metadata)
