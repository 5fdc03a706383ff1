# SPDX-License-Identifier: Apache-2.0
"""What every worker of `benchmarks` shares: it loads a model and answers lines of JSON.

A worker runs in the environment of whom it stands for, so this file needs numpy and nothing else. It
prints one line when it is ready, then one line for each line that it reads; one that decodes reads

    {"operation": "prepare", "batch": 8}
    {"operation": "generate", "prompts": [[5, 6], ...], "new_tokens": 64}
    {"operation": "logits", "prompts": [[5, 6], ...], "new_tokens": 64, "path": "logits.npy"}

and one that trains

    {"operation": "train", "batches": [[[5, 6], ...], ...]}
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

Tokens = list[list[int]]

#: Of AdamW, for everyone who trains.
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01


class Contestant:
    """A loaded model that can be asked some things."""

    #: The modules whose versions tell what was measured.
    modules: tuple[str, ...] = ()
    #: The methods that can be asked for.
    operations: ClassVar[tuple[str, ...]]


class Decoder(Contestant):
    """Decodes greedily and never ends early."""

    operations = ("prepare", "generate", "logits")

    def prepare(self, batch: int) -> None:
        """Gets ready for so many rows, before the clock runs; most have nothing to do."""

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        """The new tokens alone."""
        raise NotImplementedError

    def logits(self, prompts: Tokens, new_tokens: int) -> np.ndarray:
        """[steps, B, V]: what each step of `generate` chose from."""
        raise NotImplementedError


class Trainer(Contestant):
    """Minimises the loss of the next token, one step of AdamW for each batch."""

    operations = ("train",)

    def train(self, batches: list[Tokens]) -> float:
        """The mean of the losses before each step, with all steps done."""
        raise NotImplementedError


def serve(load: Callable[..., Contestant]) -> None:
    """Loads by the command's arguments, then answers until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    start = time.perf_counter()
    contestant = load(*sys.argv[1:])
    seconds = time.perf_counter() - start
    versions = {name: sys.modules[name].__version__ for name in contestant.modules}
    say(seconds=seconds, versions=versions)
    for line in sys.stdin:
        say(**answer(contestant, **json.loads(line)))


def answer(contestant: Contestant, operation: str, **request: Any) -> dict[str, Any]:
    """Carries one request out; "seconds" is the operation's own time, "peak" the process's memory."""
    if operation not in contestant.operations:
        raise ValueError(f"expected one of {contestant.operations}, found {operation!r}")
    path = request.pop("path", None)
    start = time.perf_counter()
    result = getattr(contestant, operation)(**request)
    seconds = time.perf_counter() - start
    if path is not None:
        np.save(path, result)
        result = None
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"seconds": seconds, "result": result, "peak": peak}
