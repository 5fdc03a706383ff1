# SPDX-License-Identifier: Apache-2.0
"""The jobs of `benchmarks/gpu.py` in PyTorch: ours and transformers' contestants on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.contest import agreement, logits_error
from benchmarks.gpu_case import PEER, Case, Memory
from benchmarks.gpu_device import TorchDevice
from benchmarks.gpu_models import (
    PAD,
    Weights,
    first_attention,
    ours,
    random_tokens,
    random_weights,
    theirs,
)
from benchmarks.gpu_race import Contestant, Distance, Makers
from benchmarks.gpu_table import (
    COMPARED_ROWS,
    JOBS,
    LIMITS,
    ROUNDED_LIMITS,
    config_of,
    new_tokens,
)
from opt_core import OPTConfig

FLASH = "flash_attention_2"
ATTENTIONS = ("eager", "sdpa", FLASH)
GROWING: Mapping[str, Any] = {}
STATIC: Mapping[str, Any] = {"cache_implementation": "static"}
#: Of AdamW, so small that the weights stay where they are.
LEARNING_RATE = 1e-7


def dtype_of(section: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, JOBS[section].dtype)
    return found


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


class Inference:
    """Models of one size with each attention, ours and transformers', which share their weights."""

    def __init__(self, size: str, device: TorchDevice) -> None:
        self.device = device
        config = config_of(size)
        weights = random_weights(config, dtype_of("inference"), device.device)
        self.builders = {
            f"{whose}{attention}": cache(partial(build, config, weights, attention))
            for whose, build in {"": ours, f"{PEER} ": theirs}.items()
            for attention in ATTENTIONS
        }

    def makers(self, case: Case) -> Makers:
        """All models on the batch of a case."""
        shape = (case.length, case.padded, self.device.device)
        batch = Batch.random(config_of(case.size), case.batch, *shape)
        compared = Batch.random(config_of(case.size), COMPARED_ROWS, *shape)

        def make(build: Callable[[], Any]) -> Contestant:
            model = build()

            def memory() -> Memory:
                run = partial(batch.logits, model)
                return self.device.peak_of_module(first_attention(model), run)

            answer, limit = partial(compared.real_logits, model), LIMITS[JOBS[case.section].dtype]
            return Contestant(answer, partial(batch.logits, model), limit, memory)

        return {name: partial(make, build) for name, build in self.builders.items()}


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

    def __init__(self, case: Case, device: TorchDevice) -> None:
        self.config, self.dtype = config_of(case.size), JOBS[case.section].dtype
        self.device, self.new = device, new_tokens(case.section, case.size)
        self.prompts = random_tokens(self.config, case.batch, case.length, device.device)
        self.weights = self._random_weights()

    def _random_weights(self) -> Weights:
        return random_weights(self.config, getattr(torch, self.dtype), self.device.device)

    def contestant(
        self,
        build: Callable[..., Any],
        attention: str = "sdpa",
        rounded: str | None = None,
        options: Mapping[str, Any] = GROWING,
    ) -> Contestant:
        """One that decodes with these options of `generate`, with weights rounded to so many bits."""
        limit, weights = LIMITS[self.dtype], self.weights
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


def decode(case: Case, device: TorchDevice) -> tuple[Makers, Distance]:
    """Tokens after a short prompt: step by step, with graphs, with rounded weights."""
    make = Decoding(case, device).contestant
    makers: Makers = {
        "ours": partial(make, ours),
        "ours static": partial(make, ours, options=STATIC),
        "ours int8": partial(make, ours, rounded="int8", options=STATIC),
        "ours int4": partial(make, ours, rounded="int4", options=STATIC),
        PEER: partial(make, theirs),
        f"{PEER} static": partial(make, theirs, options=STATIC),
    }
    return makers, decoded_distance


def prefill(case: Case, device: TorchDevice) -> tuple[Makers, Distance]:
    """The first token after a long prompt."""
    make = Decoding(case, device).contestant
    makers: Makers = {
        "ours": partial(make, ours),
        "ours flash": partial(make, ours, FLASH),
        PEER: partial(make, theirs),
        f"{PEER} flash": partial(make, theirs, FLASH),
    }
    return makers, decoded_distance


class Training:
    """Steps of AdamW, of whichever model, on the same weights with the same moments."""

    def __init__(self, case: Case, device: TorchDevice) -> None:
        self.config = config_of(case.size)
        self.tokens = random_tokens(self.config, case.batch, case.length, device.device)
        self.weights = random_weights(self.config, dtype_of("training"), device.device)
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

        return Contestant(answer, run, LIMITS[JOBS["training"].dtype])

    def _backward(self, model: Any, tokens: Tensor) -> Tensor:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach().float()


def largest_relative(expected: Tensor, found: Tensor) -> float:
    """The largest difference of several numbers, each relative to its own."""
    return float(((found - expected).abs() / expected.abs()).max())


def training(case: Case, device: TorchDevice) -> tuple[Makers, Distance]:
    """Forward and backward pass and a step of the optimizer."""
    make = Training(case, device).contestant
    makers: Makers = {
        "ours": partial(make, ours, "sdpa"),
        "ours flash": partial(make, ours, FLASH),
        PEER: partial(make, theirs, "sdpa"),
        f"{PEER} flash": partial(make, theirs, FLASH),
    }
    return makers, largest_relative


#: The models of one size at a time.
models_of = lru_cache(maxsize=1)(Inference)


def inference(case: Case, device: TorchDevice) -> tuple[Makers, Distance]:
    """One forward pass without gradients and cache."""
    return models_of(case.size, device).makers(case), relative_distance


CONTESTS: Mapping[str, Callable[[Case, TorchDevice], tuple[Makers, Distance]]] = {
    "inference": inference,
    "decode": decode,
    "prefill": prefill,
    "training": training,
}
