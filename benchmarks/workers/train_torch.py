# SPDX-License-Identifier: Apache-2.0
"""Training in PyTorch: `python train_torch.py CHECKPOINT ours|transformers PRECISION DROPOUT`.

PRECISION is "float32", "lower" (the public switch to products of bfloat16) or "autocast".
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from serving import LEARNING_RATE, WEIGHT_DECAY, Tokens, Trainer, serve

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs in a source tree, installed or not


def model_class(owner: str) -> Any:
    if owner == "ours":
        from opt_torch import OPTForCausalLM
    else:
        from transformers import OPTForCausalLM
    return OPTForCausalLM


class TorchTrainer(Trainer):
    """The usual loop; the optimizer is the fused one, as in transformers' own trainer."""

    def __init__(self, checkpoint: str, owner: str, precision: str, dropout: str) -> None:
        self.modules = ("torch",) if owner == "ours" else ("transformers", "torch")
        if precision == "lower":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        self.is_autocast = precision == "autocast"
        model = model_class(owner).from_pretrained(checkpoint, dropout=float(dropout))
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )

    def train(self, batches: list[Tokens]) -> float:
        losses = []
        for batch in torch.tensor(batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.is_autocast):
                loss = self.model(batch, labels=batch, use_cache=False).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)


if __name__ == "__main__":
    serve(TorchTrainer)
