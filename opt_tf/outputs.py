# SPDX-License-Identifier: Apache-2.0
"""Makes encodings, outputs and caches known to Keras' tree utilities (fit, predict, functional models)."""

from __future__ import annotations

from functools import partial

import optree

from opt_core.encodings import BatchEncoding
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
from opt_tf.cache import KVCache

__all__ = [
    "BaseModelOutput",
    "CausalLMOutput",
    "GenerateOutput",
    "QuestionAnsweringOutput",
    "SequenceClassifierOutput",
]


for _output in OUTPUTS:
    optree.register_pytree_node(_output, flatten, partial(unflatten, _output), namespace="keras")
optree.register_pytree_node(
    BatchEncoding,
    lambda encoding: ([*encoding.values()], tuple(encoding)),
    lambda names, values: BatchEncoding(dict(zip(names, values, strict=True))),
    namespace="keras",
)
optree.register_pytree_node(
    KVCache,
    lambda cache: cache.__tf_flatten__()[::-1],
    KVCache.__tf_unflatten__,
    namespace="keras",
)
