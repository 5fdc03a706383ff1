# SPDX-License-Identifier: Apache-2.0
"""The keys and values of past tokens: an explicit value, passed in and handed back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import dynamic_update_slice_in_dim

from opt_core.inputs import PastShapes, read_past
from opt_flax.parts import is_readable


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's keys and values, each [B, N, S, H]: what a head reads lies together."""

    key: Array
    value: Array

    def extended(self, key: Array, value: Array, length: Array | None) -> LayerCache:
        """The cache with T more columns: appended, or written at column `length` of the buffers.

        A cache of another dtype becomes one of the computation's.
        """
        past = self.to(key.dtype)
        if length is None:
            return LayerCache(
                jnp.concatenate([past.key, key], axis=2),
                jnp.concatenate([past.value, value], axis=2),
            )
        return LayerCache(
            dynamic_update_slice_in_dim(past.key, key, length, axis=2),
            dynamic_update_slice_in_dim(past.value, value, length, axis=2),
        )

    def to(self, dtype: Any) -> LayerCache:
        """The cache in that dtype; itself where it is."""
        return LayerCache(self.key.astype(dtype), self.value.astype(dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class KVCache(Sequence[tuple[Array, Array]]):
    """The cache of all layers.

    A *growing* cache (`length` None) has just the columns in use, and is copied at each extension.
    A *fixed* cache has buffers for a maximal length, of which the first `length` columns are in use;
    its shapes stay the same, so that a compiled step serves all lengths. As a sequence, a cache is
    the reference's `past_key_values`: per layer a pair (key, value), of the columns in use.
    """

    layers: tuple[LayerCache, ...]
    length: Array | None = None  # int32 scalar

    @classmethod
    def fixed(cls, num_layers: int, shape: tuple[int, int, int, int], dtype: Any) -> KVCache:
        """Empty buffers of `shape` [B, N, S, H] for every layer."""
        layers = tuple(
            LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(num_layers)
        )
        return cls(layers, jnp.zeros((), jnp.int32))

    @classmethod
    def from_pairs(cls, pairs: Any) -> KVCache:
        """A growing cache from the reference's tuples, or the cache itself where it is one.

        Raises:
            InputError: not for each layer a pair.
        """
        if isinstance(pairs, KVCache):
            return pairs
        return cls(tuple(LayerCache(*pair) for pair in read_past(pairs, jnp.asarray)))

    def advanced(self, layers: tuple[LayerCache, ...], length: int) -> KVCache:
        """This cache with the layers after `length` more tokens."""
        return KVCache(layers, None if self.length is None else self.length + length)

    def with_capacity(self, capacity: int, before: int = 0) -> KVCache:
        """The columns in use as a fixed cache of `capacity` columns, with `before` empty ones first."""
        used = int(self.used)
        room = ((0, 0), (0, 0), (before, capacity - before - used), (0, 0))
        layers = jax.tree.map(lambda x: jnp.pad(x[:, :, :used], room), self.layers)
        return KVCache(layers, jnp.asarray(before + used, jnp.int32))

    def take(self, rows: Array) -> KVCache:
        """The cache of some rows [B]."""
        return KVCache(jax.tree.map(lambda x: x[rows], self.layers), self.length)

    def shapes(self, *, waits: bool = False) -> PastShapes:
        """What is known without looking at keys and values.

        Args:
            waits: whether to wait for a device that has the length.
        """
        length = self.length
        is_known = is_readable(length) or (waits and not isinstance(length, jax.core.Tracer))
        return PastShapes(
            tuple((layer.key.shape, layer.value.shape) for layer in self.layers),
            tuple((layer.key.dtype, layer.value.dtype) for layer in self.layers),
            length is not None,
            None if length is None or not is_known else int(length),
        )

    @property
    def capacity(self) -> int:
        return self.layers[0].key.shape[2] if self.layers else 0

    @property
    def used(self) -> int | Array:
        """The number of columns in use."""
        return self.capacity if self.length is None else self.length

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self)[index]
        layer, used = self.layers[index], int(self.used)
        return layer.key[:, :, :used], layer.value[:, :, :used]

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        return (self[index] for index in range(len(self)))
