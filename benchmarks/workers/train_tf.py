# SPDX-License-Identifier: Apache-2.0
"""Training by Keras: `python train_tf.py CHECKPOINT ours|transformers xla|graph DROPOUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from serving import LEARNING_RATE, WEIGHT_DECAY, Tokens, Trainer, serve

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs in a source tree, installed or not


def load(checkpoint: str, owner: str, dropout: float) -> tuple[Any, Any]:
    """The model, and the Keras that it is made of."""
    if owner == "ours":
        import keras

        from opt_tf import TFOPTForCausalLM

        return TFOPTForCausalLM.from_pretrained(checkpoint, dropout=dropout), keras
    import tf_keras
    from transformers import TFOPTForCausalLM

    model = TFOPTForCausalLM.from_pretrained(checkpoint, from_pt=True, dropout=dropout)
    return model, tf_keras


class TFTrainer(Trainer):
    """`fit` with each model's own loss, from arrays in memory."""

    def __init__(self, checkpoint: str, owner: str, mode: str, dropout: str) -> None:
        self.model, keras = load(checkpoint, owner, float(dropout))
        packages = ("keras",) if owner == "ours" else ("transformers", "tf_keras")
        self.modules = (*packages, "tensorflow")
        optimizer = keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.model.compile(optimizer=optimizer, jit_compile=mode == "xla")

    def train(self, batches: list[Tokens]) -> float:
        ids = np.asarray(batches, np.int32)
        rows = ids.reshape(-1, ids.shape[-1])
        history = self.model.fit(
            {"input_ids": rows, "labels": rows}, batch_size=ids.shape[1], shuffle=False, verbose=0
        )
        return float(history.history["loss"][0])


if __name__ == "__main__":
    serve(TFTrainer)
