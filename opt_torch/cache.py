# SPDX-License-Identifier: Apache-2.0
"""The keys and values of past tokens: an explicit value, passed in and handed back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core.inputs import PastShapes, read_past
from opt_torch.parts import is_concrete, is_readable, to_tensor


@dataclass(frozen=True, eq=False)
class LayerCache:
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
                torch.cat([past.key, key], dim=2), torch.cat([past.value, value], dim=2)
            )
        count = key.shape[2]
        columns: Any
        if isinstance(length, int):
            columns = slice(length, length + count)
        elif count == 1:  # nothing to compute, in each layer of each step
            columns = length[None]
        else:
            columns = length + torch.arange(count, device=key.device)
        past.key[:, :, columns] = key
        past.value[:, :, columns] = value
        return past

    def to(self, dtype: torch.dtype) -> LayerCache:
        """The cache in that dtype; itself where it is."""
        if self.key.dtype == self.value.dtype == dtype:
            return self
        return LayerCache(self.key.to(dtype), self.value.to(dtype))


@dataclass(frozen=True, eq=False)
class KVCache(Sequence[tuple[Tensor, Tensor]]):
    """The cache of all layers.

    A *growing* cache (`length` None) has just the columns in use, and is copied at each extension.
    A *fixed* cache has buffers for a maximal length, of which the first `length` columns are in use;
    they are written in place. A length that is a tensor lets `torch.compile` make one program for all
    lengths, whose attention runs over all columns. As a sequence, a cache is the reference's
    `past_key_values`: per layer a pair (key, value), of the columns in use.
    """

    layers: tuple[LayerCache, ...]
    length: int | Tensor | None = None

    @classmethod
    def fixed(
        cls,
        num_layers: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """Empty buffers of `shape` [B, N, S, H] for every layer."""
        layers = tuple(
            LayerCache(
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(num_layers)
        )
        return cls(layers, 0)

    @classmethod
    def from_pairs(cls, pairs: Any, device: torch.device | None = None) -> KVCache:
        """A growing cache from the reference's tuples, or the cache itself where it is one.

        Args:
            device: of keys and values that are no tensors yet.

        Raises:
            InputError: not for each layer a pair.
        """
        if isinstance(pairs, KVCache):
            return pairs
        return cls(
            tuple(LayerCache(*x) for x in read_past(pairs, partial(to_tensor, device=device)))
        )

    def advanced(self, layers: tuple[LayerCache, ...], length: int) -> KVCache:
        """This cache with the layers after `length` more tokens."""
        return KVCache(layers, None if self.length is None else self.length + length)

    def with_capacity(self, capacity: int, before: int = 0) -> KVCache:
        """The columns in use as a fixed cache of `capacity` columns, with `before` empty ones first."""
        used = int(self.used)
        room = (0, 0, before, capacity - before - used)
        layers = tuple(
            LayerCache(*(F.pad(x[:, :, :used], room) for x in (layer.key, layer.value)))
            for layer in self.layers
        )
        return KVCache(layers, before + used)

    def take(self, rows: Tensor) -> KVCache:
        """The cache of some rows [B]."""
        layers = tuple(LayerCache(layer.key[rows], layer.value[rows]) for layer in self.layers)
        return KVCache(layers, self.length)

    def shapes(self, *, waits: bool = False) -> PastShapes:
        """What is known without looking at keys and values.

        Args:
            waits: whether to wait for a device that has the length.
        """
        length = self.length
        if isinstance(length, Tensor):
            is_known = is_concrete(length) if waits else is_readable(length)
            length = int(length) if is_known else None
        return PastShapes(
            tuple((layer.key.shape, layer.value.shape) for layer in self.layers),
            tuple((layer.key.dtype, layer.value.dtype) for layer in self.layers),
            self.length is not None,
            length if isinstance(length, int) else None,
        )

    @property
    def capacity(self) -> int:
        return self.layers[0].key.shape[2] if self.layers else 0

    @property
    def used(self) -> int | Tensor:
        """The number of columns in use."""
        return self.capacity if self.length is None else self.length

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self)[index]
        layer, used = self.layers[index], int(self.used)
        return layer.key[:, :, :used], layer.value[:, :, :used]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))
