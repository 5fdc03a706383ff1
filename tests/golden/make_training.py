# SPDX-License-Identifier: Apache-2.0
"""Write the losses of twenty steps of training with transformers 4.37.2 and torch.optim.AdamW.

Run it in an environment with transformers==4.37.2; it imports nothing of this project. The models are
those of make_golden.py without dropout; the rows, drawn by numpy from a fixed seed, end in pads, and only
the last tokens before them are labels, as many in each row.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_golden import build

MODELS = ("pre_norm", "post_norm")
STEPS, WARMUP, PEAK = 20, 1, 3e-3
ROWS, BATCH, LENGTH, ANSWER, PAD = 12, 4, 9, 3, 1


def course(step: int) -> float:
    """The share of the peak rate: a linear rise from zero, then half a cosine."""
    gone = max(0.0, (step - WARMUP) / (STEPS - WARMUP))
    return min(step / WARMUP, 0.5 * (1 + math.cos(math.pi * gone)))


def batches(seed: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and labels of every step, [STEPS, BATCH, LENGTH]."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, vocab_size, (ROWS, LENGTH))
    ends, columns = rng.integers(ANSWER + 2, LENGTH + 1, (ROWS, 1)), np.arange(LENGTH)
    ids[columns >= ends] = PAD
    labels = np.where((ends - ANSWER <= columns) & (columns < ends), ids, -100)
    chosen = np.stack([rng.permutation(ROWS)[:BATCH] for _ in range(STEPS)])
    return ids[chosen], labels[chosen]


def record(name: str, seed: int) -> dict[str, Any]:
    """What the training of a model is given, and its loss before each step."""
    model = build(name)
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    model.train()
    input_ids, labels = batches(seed, model.config.vocab_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, course)
    losses = []
    for ids, targets in zip(torch.from_numpy(input_ids), torch.from_numpy(labels), strict=True):
        optimizer.zero_grad()
        loss = model(ids, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return {"input_ids": input_ids.tolist(), "labels": labels.tolist(), "losses": losses}


def main() -> None:
    """Write training.json below --out (default: this folder)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    found: dict[str, Any] = {
        "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "peak": PEAK,
    }
    found |= {name: record(name, number) for number, name in enumerate(MODELS)}
    (out / "training.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
