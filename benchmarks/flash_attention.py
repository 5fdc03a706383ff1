# SPDX-License-Identifier: Apache-2.0
"""How much faster is FlashAttention-2 in pure inference on a GPU, and how much memory does it save?

    python benchmarks/flash_attention.py [--size opt-2.7b]... [--length 2048]... [--batch 8]...
        [--dtype float16] [--rounds 5] [--json FILE] [--plot FILE]
    python benchmarks/flash_attention.py --from-json FILE --plot FILE

The speed-ups of the reference's page: one forward pass without gradients and cache over whole rows, and
over rows of which half, at least one, are padded on the left by a quarter. Ours in plain operations
("eager"), in PyTorch's fused ones ("sdpa") and in FlashAttention, and transformers' likewise, all on the
same random weights, in one process, in turns. The logits of real tokens of two rows are compared with
those of ours in plain operations first: who differs is not timed, and the exit status is 1. Who is short
of memory, or cannot run here, is named with the reason. Attention's memory is the peak while the first
layer's attention runs, projections included, beyond what lay there when it began.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from benchmarks.flash_report import report, write_plot
from benchmarks.gpu_case import PEER, Case, Memory, Results, differing
from benchmarks.gpu_device import TorchDevice, gpu_environment
from benchmarks.gpu_models import (
    PAD,
    Weights,
    first_attention,
    ours,
    random_tokens,
    random_weights,
    theirs,
)
from benchmarks.gpu_race import Contestant, Makers, compete
from benchmarks.gpu_table import COMPARED_ROWS, INFERENCE, LIMITS, TINY_INFERENCE, config_of
from opt_core import OPTConfig

ROUNDS = 5
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")


@dataclass(frozen=True)
class Batch:
    """What the models are given."""

    ids: Tensor  # [B, T]
    mask: Tensor | None  # [B, T], None where all tokens are real

    @classmethod
    def random(
        cls, config: OPTConfig, batch: int, length: int, padded: bool, device: torch.device
    ) -> Batch:
        ids = random_tokens(config, batch, length, device)
        if not padded:
            return cls(ids, None)
        mask = torch.ones_like(ids)
        mask[: (batch + 1) // 2, : length // 4] = 0
        return cls(ids.masked_fill(mask == 0, PAD), mask)

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """[B, T, V]"""
        return model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits

    def real_logits(self, model: Any) -> Tensor:
        """[tokens, V], of real tokens."""
        logits = self.logits(model)
        return logits.flatten(0, 1) if self.mask is None else logits[self.mask == 1]


def relative_distance(expected: Tensor, found: Tensor) -> float:
    """The largest difference over the largest number."""
    return float((found - expected).abs().max().float() / expected.abs().max().float())


Builders = Mapping[str, Callable[[], Any]]


def builders(config: OPTConfig, weights: Weights) -> Builders:
    """Ours and transformers' models by name, with each attention, all on these weights."""
    found = {
        attention: cache(partial(ours, config, weights, attention)) for attention in ATTENTIONS
    }
    for attention in ATTENTIONS:
        found[f"{PEER} {attention}"] = cache(partial(theirs, config, weights, attention))
    return found


def contestants(models: Builders, case: Case, limit: float, device: TorchDevice) -> Makers:
    """All models on the batch of a case."""
    shape = (case.length, case.padded, device.device)
    batch = Batch.random(config_of(case.size), case.batch, *shape)
    compared = Batch.random(config_of(case.size), COMPARED_ROWS, *shape)

    def make(build: Callable[[], Any]) -> Contestant:
        model = build()

        def memory() -> Memory:
            return device.peak_of_module(first_attention(model), partial(batch.logits, model))

        answer = partial(compared.real_logits, model)
        return Contestant(answer, partial(batch.logits, model), limit, memory)

    return {name: partial(make, build) for name, build in models.items()}


def measure(options: argparse.Namespace, results: Results, device: TorchDevice) -> list[Case]:
    """Adds all cases that were asked for, one size after the other; returns them."""
    found = []
    for size in options.size:
        config = config_of(size)
        dtype = getattr(torch, options.dtype)
        models = builders(config, random_weights(config, dtype, device.device))
        for length in options.length:
            for padded in (False, True):
                for batch in options.batch:
                    case = Case("inference", size, batch, length, padded)
                    device.free()
                    makers = contestants(models, case, LIMITS[options.dtype], device)
                    compete(case, makers, relative_distance, device, options.rounds)
                    results.add(case)
                    results.write(options.json)
                    print(report([case]), flush=True)
                    found.append(case)
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", action="append", choices=INFERENCE.sizes)
    add("--length", action="append", type=int, help=f"of rows (default: {INFERENCE.lengths})")
    add("--batch", action="append", type=int, help=f"number of rows (default: {INFERENCE.batches})")
    add("--dtype", choices=[*LIMITS], default="float16", help="(default: %(default)s)")
    add("--rounds", type=int, default=ROUNDS, help="(default: %(default)s)")
    add("--device", default="cuda", help="(default: %(default)s)")
    add("--tiny", action="store_true", help="a small model and short rows: a trial of this program")
    add("--json", type=Path, help="where to write the figures, to those that are there")
    add("--plot", type=Path, help="where to draw them (.svg or .png); needs matplotlib")
    add("--from-json", type=Path, help="measure nothing, draw what is in this file")
    options = parser.parse_args(arguments)
    plan = TINY_INFERENCE if options.tiny else INFERENCE
    options.size = plan.sizes if options.tiny else options.size or plan.sizes
    options.length = options.length or plan.lengths
    options.batch = options.batch or plan.batches
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures what the arguments ask for; returns 1 if logits differ that should not."""
    options = parse(arguments)
    found: list[Case] = []
    if options.from_json:
        results = Results.read(options.from_json)
    else:
        device = TorchDevice(options.device)
        environment: Mapping[str, Any] = {**gpu_environment(device), "dtype": options.dtype}
        results = Results.opened(options.json, environment)
        found = measure(options, results, device)
    if options.plot:
        write_plot(results.of("inference"), options.plot)
    for each in differing(found):
        print(f"LOGITS DIFFER: {each}", file=sys.stderr)
    return 1 if differing(found) else 0


if __name__ == "__main__":
    sys.exit(main())
