# SPDX-License-Identifier: Apache-2.0
"""OPT in JAX, with Flax modules."""

try:
    import flax as _flax  # noqa: F401
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise ImportError("opt_flax needs JAX and Flax: pip install 'opt-zoo[flax]'.") from error

from opt_core import GenerationConfig, OPTConfig, OPTTokenizer
from opt_flax.cache import KVCache, LayerCache
from opt_flax.heads import FlaxOPTForCausalLM
from opt_flax.model import FlaxOPTModel
from opt_flax.task_heads import FlaxOPTForQuestionAnswering, FlaxOPTForSequenceClassification

__all__ = [
    "FlaxOPTForCausalLM",
    "FlaxOPTForQuestionAnswering",
    "FlaxOPTForSequenceClassification",
    "FlaxOPTModel",
    "GenerationConfig",
    "KVCache",
    "LayerCache",
    "OPTConfig",
    "OPTTokenizer",
]
