# SPDX-License-Identifier: Apache-2.0
"""Between the parameter table and the tree of parameters: initial values, assigning, reading back.

A tree is a plain nested dict; here it is mostly flat: {path: array}, the path as in `Param.path`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from opt_core import InputError, OPTConfig
from opt_core.loading import Source
from opt_core.params import EMBEDDING_NAME, Kind, Param, param_table
from opt_flax.decoding_weights import DECODING_LEAF

Params = dict[str, Any]

INITIAL_VALUES: Mapping[Kind, Callable[..., Array]] = {
    Kind.LINEAR: lambda key, shape, dtype, std: std * jax.random.normal(key, shape, dtype),
    Kind.BIAS: lambda key, shape, dtype, std: jnp.zeros(shape, dtype),
    Kind.EMBEDDING: lambda key, shape, dtype, std: std * jax.random.normal(key, shape, dtype),
    Kind.NORM_SCALE: lambda key, shape, dtype, std: jnp.ones(shape, dtype),
    Kind.NORM_BIAS: lambda key, shape, dtype, std: jnp.zeros(shape, dtype),
}


def initializer(kind: Kind, std: float, zero_row: int | None = None) -> Callable[..., Array]:
    """A function (key, shape, dtype) -> initial values, with one row of zeros if asked for."""

    def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        values = INITIAL_VALUES[kind](key, shape, dtype, std)
        return values if zero_row is None else values.at[zero_row].set(0)

    return draw


def initialize(
    rng: Array, config: OPTConfig, params: tuple[Param, ...], arch: str, dtype: Any
) -> dict[tuple[str, ...], Array]:
    """Draws N(0, init_std) for matrices, zeros biases and the pad row, sets norms to one.

    `modeling_opt.py:626-635` of the reference.
    """
    values = {}
    for index, param in enumerate(params):
        zero_row = config.pad_token_id if param.name == EMBEDDING_NAME else None
        draw = initializer(param.spec.kind, config.init_std, zero_row)
        key = jax.random.fold_in(rng, index)
        values[param.path("flax", arch)] = draw(key, flax_shape(param), dtype)
    return values


def flax_shape(param: Param) -> tuple[int, ...]:
    """The parameter's shape in Flax's layout."""
    return param.shape[::-1] if param.transposed("flax") else param.shape


def assign(
    config: OPTConfig,
    arch: str,
    sources: Mapping[str, Source],
    dtype: Callable[[np.dtype], np.dtype],
    param_dtype: Any,
) -> Params:
    """The parameters of a checkpoint, read one at a time; missing ones start anew.

    Args:
        dtype: gives for a tensor's dtype in the file the one to hold it in.
        param_dtype: of those that start anew.
    """
    table = param_table(config, arch)
    missing = tuple(p for p in table if p.name not in sources)
    values = initialize(jax.random.key(0), config, missing, arch, param_dtype)
    for param in table:
        if param.name in sources:
            values[param.path("flax", arch)] = to_array(sources[param.name], dtype)
    return unflatten_dict(values)


def resized(weight: Array, size: int, std: float, key: Array) -> Array:
    """[V, E] -> [size, E]: the first rows, then as many as are missing, drawn anew."""
    shape = (max(size - len(weight), 0), weight.shape[1])
    rows = INITIAL_VALUES[Kind.EMBEDDING](key, shape, weight.dtype, std)
    return jnp.concatenate([weight[:size], rows])


def to_array(source: Source, dtype: Callable[[np.dtype], np.dtype]) -> Array:
    """The parameter; JAX takes over the memory of an aligned array instead of copying."""
    values = source.read("flax")
    return jax.device_put(values.astype(dtype(values.dtype), copy=False))


def cast(params: Mapping[str, Any], dtype: Any, mask: Any = None) -> Params:
    """Another tree, with the floating-point leaves in `dtype`: all, or those where the mask is True.

    Raises:
        InputError: a mask of another structure.
    """

    def cast_leaf(leaf: Any, chosen: bool) -> Any:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(leaf, dtype) if chosen and is_float else leaf

    tree = unfreeze(dict(params))
    chosen = jax.tree.map(lambda _: True, tree) if mask is None else unfreeze(dict(mask))
    if jax.tree.structure(chosen) != jax.tree.structure(tree):
        raise InputError(
            "mask: expected a tree of the structure of params, with True where a leaf is to be cast, "
            f"found {jax.tree.structure(chosen)}."
        )
    return jax.tree.map(cast_leaf, tree, chosen)


def check_params(params: Mapping[str, Any], config: OPTConfig, arch: str) -> Params:
    """The tree as plain dicts, after a check of its names and shapes against the table.

    Raises:
        InputError: names the first difference.
    """
    tree = unfreeze(dict(params))
    found = {path: jnp.shape(value) for path, value in flatten_dict(tree).items()}
    expected = {p.path("flax", arch): flax_shape(p) for p in param_table(config, arch)}
    for path in [*expected, *found]:
        if found.get(path) != expected.get(path):
            raise InputError(
                f"params: {'/'.join(path)}: expected {expected.get(path, 'no such parameter')}, "
                f"found {found.get(path, 'none')}. Are these the parameters of another model?"
            )
    return tree


def canonical_arrays(
    params: Mapping[str, Any], config: OPTConfig, arch: str
) -> Iterator[tuple[Param, np.dtype, Callable[[], np.ndarray]]]:
    """Each row of the table, its dtype in the tree, and a function that reads its values."""
    values = flatten_dict(params)
    for param in param_table(config, arch):
        array = values[param.path("flax", arch)]
        yield param, np.dtype(array.dtype), partial(to_canonical, param, array)


def find_rows(params: Mapping[str, Any], config: OPTConfig, arch: str, name: str) -> Array:
    """The word embeddings [V, E], or the head [V, E] in a tree of either layout.

    Raises:
        InputError: the tree has none, or of another shape.
    """
    param = next(p for p in param_table(config, arch) if p.name == name)
    path, values = param.path("flax", arch), flatten_dict(unfreeze(dict(params)))
    found = values.get((*path[:-1], DECODING_LEAF), values.get(path))
    if path in values and param.transposed("flax"):
        found = found.T
    check_rows("/".join(path[:-1]), found, param.shape)
    return found


def with_rows(
    params: Mapping[str, Any], config: OPTConfig, arch: str, name: str, rows: Array
) -> Params:
    """A tree with other word embeddings [any, E], or another head [any, E], and the same layout."""
    param = next(p for p in param_table(config, arch) if p.name == name)
    path, values = param.path("flax", arch), flatten_dict(unfreeze(dict(params)))
    if (*path[:-1], DECODING_LEAF) in values:
        values[(*path[:-1], DECODING_LEAF)] = rows
    else:
        values[path] = rows.T if param.transposed("flax") else rows
    return unflatten_dict(values)


def check_rows(what: str, rows: Any, shape: tuple[int, ...]) -> None:
    """Raises InputError unless there are rows, and as many and as long as the configuration says."""
    found = "none" if rows is None else jnp.shape(rows)
    if found != shape:
        raise InputError(
            f"{what}: expected {shape} (vocab_size, word_embed_proj_dim), found {found}. "
            "resize_token_embeddings changes the number of rows."
        )


def to_canonical(param: Param, array: Array) -> np.ndarray:
    """The parameter's values in canonical layout, from any device."""
    values = np.asarray(array)
    return np.ascontiguousarray(values.T if param.transposed("flax") else values)
