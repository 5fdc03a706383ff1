# SPDX-License-Identifier: Apache-2.0
"""The jobs of `benchmarks/gpu.py` in PyTorch: ours and transformers' contestants on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.contest import agreement, logits_error
from benchmarks.gpu_case import PEER, Case
from benchmarks.gpu_device import TorchDevice
from benchmarks.gpu_models import ours, random_tokens, random_weights, theirs
from benchmarks.gpu_race import Contestant, Makers, compete
from benchmarks.gpu_table import COMPARED_ROWS, LIMITS, ROUNDED_LIMITS, Job, config_of
from opt_core import OPTConfig

DTYPE = "bfloat16"
FLASH = "flash_attention_2"
GROWING: Mapping[str, Any] = {}
STATIC: Mapping[str, Any] = {"cache_implementation": "static"}
#: Of AdamW, so small that the weights stay where they are.
LEARNING_RATE = 1e-7


class Decoded(NamedTuple):
    """The greedy tokens of one row, and what they were chosen from."""

    tokens: list[list[int]]  # [1, steps], chosen as they are when the clock runs
    logits: np.ndarray  # [steps, 1, V]


def decoded_distance(expected: Decoded, found: Decoded) -> float:
    """The larger of two numbers, relative to the largest logit.

    The logits' error as long as the inputs are the same, and the margin by which `expected` did not
    take the first token of `found` that is another.
    """
    same = agreement(expected.tokens, found.tokens, lambda: expected.logits)
    steps = min(same.same + 1, same.tokens)
    return max(same.margin, logits_error(expected.logits[:, 0], found.logits[:, 0], steps))


class Decoding:
    """Greedy decoding of one size: who takes part with which options."""

    def __init__(self, case: Case, job: Job, device: TorchDevice) -> None:
        self.config = config_of(case.size)
        self.device, self.new = device, job.new
        self.prompts = random_tokens(self.config, case.batch, case.length, device.device)
        self.weights = self._random_weights()

    def _random_weights(self) -> Any:
        return random_weights(self.config, getattr(torch, DTYPE), self.device.device)

    def contestant(
        self,
        build: Callable[..., Any],
        attention: str = "sdpa",
        rounded: str | None = None,
        options: Mapping[str, Any] = GROWING,
    ) -> Contestant:
        """One that decodes with these options of `generate`, with weights rounded to so many bits."""
        limit, weights = LIMITS[DTYPE], self.weights
        if rounded is not None:
            limit, weights = ROUNDED_LIMITS[rounded], self._random_weights()  # which are given up
        model = build(self.config, weights, attention)
        if rounded is not None:
            model.prepare_for_decoding(weights=rounded)
        run = partial(self._generate, model, **options)

        def answer() -> Decoded:
            output = self._generate(
                model, **options, return_dict_in_generate=True, output_logits=True
            )
            logits = [step.float().cpu().numpy() for step in output.logits]
            tokens = run()[:, self.prompts.shape[1] :]
            return Decoded(tokens.tolist(), np.stack(logits))

        return Contestant(answer, run, limit)

    @torch.no_grad()
    def _generate(self, model: Any, **options: Any) -> Any:
        if isinstance(model.config, OPTConfig):
            options["eos_token_id"] = None
        mask = torch.ones_like(self.prompts)
        return model.generate(
            self.prompts,
            attention_mask=mask,
            max_new_tokens=self.new,
            do_sample=False,
            **options,
        )


def run_decode(case: Case, job: Job, device: TorchDevice, rounds: int) -> None:
    """Tokens after a short prompt: step by step, with graphs, with rounded weights."""
    make = Decoding(case, job, device).contestant
    makers: Makers = {
        "ours": partial(make, ours),
        "ours static": partial(make, ours, options=STATIC),
        "ours int8": partial(make, ours, rounded="int8", options=STATIC),
        "ours int4": partial(make, ours, rounded="int4", options=STATIC),
        PEER: partial(make, theirs),
        f"{PEER} static": partial(make, theirs, options=STATIC),
    }
    compete(case, makers, decoded_distance, device, rounds)


def run_prefill(case: Case, job: Job, device: TorchDevice, rounds: int) -> None:
    """The first token after a long prompt."""
    make = Decoding(case, job, device).contestant
    makers: Makers = {
        "ours": partial(make, ours),
        "ours flash": partial(make, ours, FLASH),
        PEER: partial(make, theirs),
        f"{PEER} flash": partial(make, theirs, FLASH),
    }
    compete(case, makers, decoded_distance, device, rounds)


class Training:
    """Steps of AdamW, of whichever model, on the same weights with the same moments."""

    def __init__(self, case: Case, device: TorchDevice) -> None:
        self.config = config_of(case.size)
        self.tokens = random_tokens(self.config, case.batch, case.length, device.device)
        self.weights = random_weights(self.config, getattr(torch, DTYPE), device.device)
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=LEARNING_RATE, fused=True)

    def contestant(self, build: Callable[..., Any], attention: str) -> Contestant:
        model = build(self.config, self.weights, attention)

        def answer() -> Tensor:
            """The loss and the gradient's length, without dropout."""
            loss = self._backward(model.eval(), self.tokens[:COMPARED_ROWS])
            gradients = [weight.grad for weight in self.weights.values()]
            length = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in gradients])
            )
            self.optimizer.zero_grad()
            return torch.stack([loss, length]).cpu()

        def run() -> None:
            self._backward(model.train(), self.tokens)
            self.optimizer.step()
            self.optimizer.zero_grad()

        return Contestant(answer, run, LIMITS[DTYPE])

    def _backward(self, model: Any, tokens: Tensor) -> Tensor:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach().float()


def largest_relative(expected: Tensor, found: Tensor) -> float:
    """The largest difference of several numbers, each relative to its own."""
    return float(((found - expected).abs() / expected.abs()).max())


def run_training(case: Case, job: Job, device: TorchDevice, rounds: int) -> None:
    """Forward and backward pass and a step of the optimizer."""
    make = Training(case, device).contestant
    makers: Makers = {
        "ours": partial(make, ours, "sdpa"),
        "ours flash": partial(make, ours, FLASH),
        PEER: partial(make, theirs, "sdpa"),
        f"{PEER} flash": partial(make, theirs, FLASH),
    }
    compete(case, makers, largest_relative, device, rounds)


RUNNERS: Mapping[str, Callable[[Case, Job, TorchDevice, int], None]] = {
    "decode": run_decode,
    "prefill": run_prefill,
    "training": run_training,
}
