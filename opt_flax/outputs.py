# SPDX-License-Identifier: Apache-2.0
"""The outputs of `opt_core.outputs`, made known to JAX as trees of arrays."""

from __future__ import annotations

from functools import partial

import jax

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

for _output in OUTPUTS:
    jax.tree_util.register_pytree_node(_output, flatten, partial(unflatten, _output))

__all__ = [
    "BaseModelOutput",
    "CausalLMOutput",
    "GenerateOutput",
    "QuestionAnsweringOutput",
    "SequenceClassifierOutput",
]
