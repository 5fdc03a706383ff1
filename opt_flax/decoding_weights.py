# SPDX-License-Identifier: Apache-2.0
"""Linear weights laid out for decoding, which reads each of them once per token.

A plain tree of parameters holds each matrix as `kernel` [I, O]. One that is laid out for decoding
holds its transpose as `weight` [O, I] instead: on a CPU, XLA multiplies few rows faster so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from opt_core import InputError, UnsupportedError

PLAIN_LEAF, DECODING_LEAF = "kernel", "weight"


def check_layout(batch_size: int, weights: str | None) -> None:
    """Raises what `FlaxOPTPreTrainedModel.prepare_for_decoding` says about its arguments."""
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1, found {batch_size}.")
    if weights == "int8":
        raise UnsupportedError(
            'weights="int8": on a CPU, JAX has no fast product with int8 weights. Leave `weights` '
            "out, or decode with opt_torch."
        )
    if weights is not None:
        raise InputError(f"weights: expected None, found {weights!r}.")


def prepare(params: dict[str, Any]) -> None:
    """Lays a tree out, in place, and frees each kernel when its transpose is made."""
    for module in _modules(params):
        if _is_on_one_cpu(module.get(PLAIN_LEAF)):
            module[DECODING_LEAF] = jnp.transpose(module.pop(PLAIN_LEAF)).block_until_ready()


def plain(params: Mapping[str, Any], *, views: bool = False) -> dict[str, Any]:
    """A plain tree with the values of one that may be laid out.

    Args:
        views: whether the kernels may be numpy's, views on the weights, rather than copies.
    """
    values = flatten_dict(unfreeze(dict(params)))
    for path in [path for path in values if path[-1] == DECODING_LEAF]:
        weight = values.pop(path)
        values[(*path[:-1], PLAIN_LEAF)] = np.asarray(weight).T if views else jnp.transpose(weight)
    return unflatten_dict(values)


def _modules(params: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield params
    for value in params.values():
        if isinstance(value, dict):
            yield from _modules(value)


def _is_on_one_cpu(value: Any) -> bool:
    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return False
    return [device.platform for device in value.devices()] == ["cpu"]
