# SPDX-License-Identifier: Apache-2.0
"""OPT in TensorFlow, on Keras 3."""

import opt_tf._keras  # noqa: F401 - first: chooses the backend of Keras, or says what is missing
from opt_core import GenerationConfig, OPTConfig, OPTTokenizer
from opt_tf.cache import KVCache, LayerCache
from opt_tf.heads import TFOPTForCausalLM
from opt_tf.model import TFOPTModel
from opt_tf.task_heads import TFOPTForQuestionAnswering, TFOPTForSequenceClassification

__all__ = [
    "GenerationConfig",
    "KVCache",
    "LayerCache",
    "OPTConfig",
    "OPTTokenizer",
    "TFOPTForCausalLM",
    "TFOPTForQuestionAnswering",
    "TFOPTForSequenceClassification",
    "TFOPTModel",
]
