# SPDX-License-Identifier: Apache-2.0
"""Makes outputs and caches known to PyTorch's tree utilities (export, vmap, data parallelism)."""

from __future__ import annotations

from torch.utils import _pytree as pytree

from opt_core.outputs import (
    OUTPUTS,
    BaseModelOutput,
    CausalLMOutput,
    GenerateOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    flatten,
    unflatten,
)
from opt_torch.cache import KVCache, LayerCache

__all__ = [
    "BaseModelOutput",
    "CausalLMOutput",
    "GenerateOutput",
    "QuestionAnsweringOutput",
    "SequenceClassifierOutput",
]


for _output in OUTPUTS:
    pytree.register_pytree_node(
        _output,
        flatten,
        lambda values, names, cls=_output: unflatten(cls, names, iter(values)),  # type: ignore[misc]
        serialized_type_name=f"opt_core.outputs.{_output.__name__}",
    )
pytree.register_pytree_node(
    LayerCache,
    lambda layer: ([layer.key, layer.value], None),
    lambda values, _: LayerCache(*values),
    serialized_type_name="opt_torch.cache.LayerCache",
)
pytree.register_pytree_node(
    KVCache,
    lambda cache: ([cache.layers, cache.length], None),
    lambda values, _: KVCache(*values),
    serialized_type_name="opt_torch.cache.KVCache",
)
