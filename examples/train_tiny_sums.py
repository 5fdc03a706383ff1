# SPDX-License-Identifier: Apache-2.0
"""Train `opt-tiny-sums` from nothing: an OPT with 0.46M parameters learns sums and differences in words.

    python examples/train_tiny_sums.py my-sums     (needs opt-zoo[torch]; about ten minutes on one core)

Writes a checkpoint that all three frameworks load. The one inside the package was made by this script
with its default arguments; without a directory, it is overwritten. The loss counts the answer fully and
the prompt, which is mostly chance, little.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core.assets import TINY_SUMS
from opt_core.assets.sums import TrainingData, encode_problems, problems, train_tokenizer
from opt_torch import OPTConfig, OPTForCausalLM

BATCH = 256
PEAK_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "directory",
        type=Path,
        nargs="?",
        default=TINY_SUMS,
        help="where the checkpoint is written (default: into the package)",
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; the model is tiny")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    tokenizer = train_tokenizer()
    train = encode_problems(tokenizer, problems("train"))
    held_out = encode_problems(tokenizer, problems("test"))
    model = OPTForCausalLM(config(len(tokenizer)))
    fit(model, train, held_out, arguments.steps)

    model.half().float()  # what a reader of the file will see
    for name, data in (("training", train), ("held-out", held_out)):
        right = answered(model, data)
        print(f"{name} problems answered in full: {right} of {len(data.labels)}")
    model.half().save_pretrained(arguments.directory)
    tokenizer.save_pretrained(arguments.directory)


def config(vocab_size: int) -> OPTConfig:
    """Return the shape of the model: 2 layers of width 128."""
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        word_embed_proj_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=512,
        max_position_embeddings=128,
        dropout=0.0,
    )


def fit(model: OPTForCausalLM, train: TrainingData, held_out: TrainingData, steps: int) -> None:
    """Train with AdamW; the rate rises for `WARMUP_STEPS` and falls along a half cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
        ),
    )
    started = time.perf_counter()
    batches = shuffled_batches(train)
    model.train()
    for step in range(1, steps + 1):
        input_ids, weights = next(batches)
        loss = weighted_loss(model(input_ids, use_cache=False).logits, input_ids, weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            right, count = answered(model, held_out), len(held_out.labels)
            seconds = time.perf_counter() - started
            print(f"step {step}: loss {loss.item():.4f}, held out {right}/{count}, {seconds:.0f} s")


def shuffled_batches(data: TrainingData) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `input_ids` [B, T] and `weights` [B, T], in a new order each time through the data."""
    input_ids, weights = torch.from_numpy(data.input_ids), torch.from_numpy(data.weights)
    while True:
        for rows in torch.randperm(len(input_ids)).split(BATCH):
            yield input_ids[rows], weights[rows]


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the mean cross-entropy of each next token, weighted; `logits` [B, T, V]."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


@torch.no_grad()
def answered(model: OPTForCausalLM, data: TrainingData) -> int:
    """Return how many problems the model answers in full, to the closing `</s>`.

    The right answer is fed to it, so that the argmax is right everywhere exactly if greedy decoding is.
    """
    model.eval()
    right = 0
    for rows in torch.arange(len(data.labels)).split(1024):
        input_ids, weights = (torch.from_numpy(a)[rows] for a in (data.input_ids, data.weights))
        chosen = model(input_ids, use_cache=False).logits[:, :-1].argmax(-1)
        matters = weights[:, 1:] == 1
        right += int(((chosen == input_ids[:, 1:]) | ~matters).all(1).sum())
    model.train()
    return right


if __name__ == "__main__":
    main()
