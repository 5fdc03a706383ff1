# SPDX-License-Identifier: Apache-2.0
"""One framework, one checkpoint: the logits of prompts, and how they are greedily continued."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opt_zoo import processes
from opt_zoo.backends import Framework
from opt_zoo.processes import OnEvent, Reply
from opt_zoo.prompts import Prompts
from opt_zoo.worker import Request


@dataclass(frozen=True)
class Greedy:
    """What a model made of prompts."""

    tokens: tuple[tuple[int, ...], ...]  # new ones, the end of sequence included
    logits: NDArray[np.float32]  # [real tokens of the prompts, V]
    reply: Reply


def run_greedily(
    framework: Framework,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    dtype: str | None = None,
    repeat: bool = False,
    on_event: OnEvent = lambda event: None,
) -> Greedy:
    """Runs the prompts' model in a process of its own; raises OPTError."""
    with tempfile.TemporaryDirectory() as folder:
        logits_file = Path(folder) / "logits.npy"
        request = Request(
            framework,
            str(prompts.directory),
            prompts.inputs,
            {"max_new_tokens": max_new_tokens, "do_sample": False},
            dtype=dtype,
            logits_file=str(logits_file),
            repeat=repeat,
        )
        reply = processes.run(request, on_event)
        logits = np.load(logits_file)[prompts.mask]
    tokens = prompts.new_tokens(reply.sequences)
    return Greedy(tuple(map(tuple, tokens)), logits, reply)


def largest_difference(
    first: NDArray[np.float32], second: NDArray[np.float32]
) -> tuple[float, float]:
    """The largest difference, and the same relative to the largest absolute value of the two.

    Both are nan for vocabularies of different sizes.
    """
    if first.shape != second.shape:
        return float("nan"), float("nan")
    absolute = float(np.abs(first - second).max())
    largest = float(max(np.abs(first).max(), np.abs(second).max()))
    return absolute, absolute / largest if largest else absolute
