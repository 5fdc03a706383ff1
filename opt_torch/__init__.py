# SPDX-License-Identifier: Apache-2.0
"""OPT in PyTorch."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("opt_torch needs PyTorch: pip install 'opt-zoo[torch]'.") from error

from opt_core import GenerationConfig, OPTConfig, OPTTokenizer
from opt_torch.cache import KVCache, LayerCache
from opt_torch.heads import OPTForCausalLM
from opt_torch.model import OPTModel
from opt_torch.task_heads import OPTForQuestionAnswering, OPTForSequenceClassification

__all__ = [
    "GenerationConfig",
    "KVCache",
    "LayerCache",
    "OPTConfig",
    "OPTForCausalLM",
    "OPTForQuestionAnswering",
    "OPTForSequenceClassification",
    "OPTModel",
    "OPTTokenizer",
]
