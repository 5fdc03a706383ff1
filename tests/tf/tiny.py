# SPDX-License-Identifier: Apache-2.0
"""A model that compiles in no time, and texts for it."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from opt_core import OPTConfig
from opt_tf import TFOPTForCausalLM

CONFIG = OPTConfig(
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    ffn_dim=24,
    max_position_embeddings=16,
    num_labels=3,
    dropout=0.0,
    init_std=0.1,
    use_cache=False,
)
RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(3, 61, (12, 7)).astype("int32")
MASK = np.ones_like(IDS)
MASK[::3, :3] = 0
LABELS = np.where(MASK == 1, IDS, -100).astype("int32")
TEXTS = {"input_ids": IDS, "attention_mask": MASK}
TASK = {**TEXTS, "labels": LABELS}

#: Keras 3.15 turns its variables into arrays in a way that numpy 2 warns of.
KERAS_ON_NUMPY_2 = "ignore:__array__ implementation doesn't accept"


def tiny(cls: Any = TFOPTForCausalLM, *, config: OPTConfig = CONFIG, **options: Any) -> Any:
    """A model, always with the same weights."""
    keras.utils.set_random_seed(0)
    return cls(config.replace(problem_type=None), **options)


def compiled(
    cls: Any = TFOPTForCausalLM,
    *,
    config: OPTConfig = CONFIG,
    optimizer: Any = None,
    dtype: Any = None,
    **options: Any,
) -> Any:
    """The same, ready for `fit`: without XLA and eagerly unless told otherwise."""
    model = tiny(cls, config=config, dtype=dtype)
    model.compile(
        optimizer=optimizer or keras.optimizers.Adam(1e-2),
        **{"jit_compile": False, "run_eagerly": "jit_compile" not in options, **options},
    )
    return model


def assert_same_weights(left: Any, right: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    for expected, found in zip(left.get_weights(), right.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)
