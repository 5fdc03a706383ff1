# SPDX-License-Identifier: Apache-2.0
"""The device of PyTorch's contestants, what it reaches at best, and what the machine is."""

from __future__ import annotations

import gc
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.command import environment
from benchmarks.gpu_case import Memory
from opt_core import UnsupportedError

PACKAGES = (
    "flash_attn",
    "flax",
    "jax",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "optax",
    "torch",
    "torchao",
    "transformers",
    "triton",
)
#: How often the plain operations run in a row, and in how many rounds; the best round counts.
REPEATS, ROUNDS = 10, 5
#: Bytes to copy and to sum up, and rows and columns of the matrices to multiply; on a CPU, a trial.
BYTES, SIDE = 4 * 2**30, 8192
TINY_BYTES, TINY_SIDE = 2**20, 64


class TorchDevice:
    """A CUDA device, or a CPU, which tells no memory."""

    excuses: tuple[type[Exception], ...] = (torch.OutOfMemoryError, UnsupportedError)

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        if self.is_cuda and not torch.cuda.is_available():
            raise SystemExit(
                "expected a CUDA device, found none. For a trial: --device cpu --tiny."
            )

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, call: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def peak(self, call: Callable[[], object]) -> Memory:
        if not self.is_cuda:
            call()
            return None
        self._wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self._wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def peak_of_module(self, module: nn.Module, call: Callable[[], object]) -> Memory:
        """The most bytes while `module` runs within one call, beyond those when it begins."""
        if not self.is_cuda:
            return None
        found: list[int] = []

        def begin(*_: object) -> None:
            torch.cuda.reset_peak_memory_stats(self.device)
            found.append(torch.cuda.memory_allocated(self.device))

        def end(*_: object) -> None:
            found.append(torch.cuda.max_memory_allocated(self.device))

        handles = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        try:
            call()
        finally:
            for handle in handles:
                handle.remove()
        return found[1] - found[0]

    def free(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


def measure_card(device: TorchDevice) -> dict[str, float]:
    """What plain operations reach: bytes per second of a copy (read and written) and of a sum (read).

    "product" are the operations per second of a bfloat16 matrix product of random numbers.
    """
    count, side = (BYTES, SIDE) if device.is_cuda else (TINY_BYTES, TINY_SIDE)
    source = torch.ones(count // 4, device=device.device)
    target = torch.empty_like(source)
    matrices = [torch.randn(side, side, device=device.device).to(torch.bfloat16) for _ in range(2)]
    product = torch.empty_like(matrices[0])
    return {
        "copy": 2 * count / _best(device, lambda: target.copy_(source)),
        "read": count / _best(device, source.sum),
        "product": 2 * side**3 / _best(device, lambda: torch.mm(*matrices, out=product)),
        "bytes": count,
        "side": side,
    }


def _best(device: TorchDevice, call: Callable[[], object]) -> float:
    """Seconds of one call in the best round; the calls of a round follow each other unwatched."""

    def run() -> None:
        for _ in range(REPEATS):
            call()

    run()
    return min(device.seconds(run) for _ in range(ROUNDS)) / REPEATS


def gpu_environment(device: TorchDevice) -> dict[str, Any]:
    """The machine, its card, and the versions of whatever may be measured."""
    card: dict[str, Any] = {"card": "none, a trial on the CPU"}
    if device.is_cuda:
        properties = torch.cuda.get_device_properties(device.device)
        card = {
            "card": properties.name,
            "card_memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**environment(), **card, "versions": versions}
