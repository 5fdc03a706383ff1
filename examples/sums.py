# SPDX-License-Identifier: Apache-2.0
"""Sums in words, learnt from nothing: the model's shape and the plan of its training, for all frameworks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from examples.training import Array, right_rows
from opt_core import OPTConfig
from opt_core.assets.sums import TrainingData, encode_problems, problems, train_tokenizer
from opt_core.tokenizer import OPTTokenizer

PLAN = {
    "steps": 2000,
    "save_every": 100,
    "batch_size": 256,
    "learning_rate": 3e-3,
    "output": Path("my-sums"),
}
WEIGHT_DECAY = 0.5  # much, or the model knows by heart what it was shown, and no more


def tokenizer_and_data() -> tuple[OPTTokenizer, TrainingData, TrainingData]:
    """The tokenizer, the problems to learn from, and those held out."""
    tokenizer = train_tokenizer()
    train, held_out = (encode_problems(tokenizer, problems(name)) for name in ("train", "test"))
    return tokenizer, train, held_out


def config(vocab_size: int) -> OPTConfig:
    """The shape of the model: 2 layers of width 128."""
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        word_embed_proj_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=512,
        max_position_embeddings=128,
        dropout=0.0,
        init_std=0.06,  # narrow as the model is, it learns sooner from wider weights
    )


def accuracy(choose: Callable[[Array], Array], data: TrainingData) -> float:
    """The share of problems that a model answers in full.

    Args:
        choose: gives the most likely next token after each of the ids [B, T].
    """
    quarters = zip(np.split(data.input_ids, 4), np.split(data.labels, 4), strict=True)
    return sum(right_rows(choose(ids), labels) for ids, labels in quarters) / len(data.labels)
