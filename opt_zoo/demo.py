# SPDX-License-Identifier: Apache-2.0
"""The main job: one checkpoint answers the same prompts in each framework, and the answers are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_zoo.backends import Framework
from opt_zoo.logits import largest_difference, run_greedily
from opt_zoo.processes import OnEvent
from opt_zoo.prompts import Prompts

#: Problems that the embedded model never saw in training.
DEFAULT_PROMPTS = (
    "ninety-six plus eighty-seven is",
    "thirty-eight minus seventy-two is",
    "twenty minus seven is",
)


@dataclass(frozen=True)
class Answer:
    """What one framework said, and what it took."""

    framework: Framework
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]  # new ones, the end of sequence included
    logits: NDArray[np.float32]  # [real tokens of the prompts, V]
    load_seconds: float  # from_pretrained, without the import of the framework
    first_seconds: float  # the first call of generate, compilation included
    best_seconds: float  # the fastest of several more such calls
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all prompts together, in the best of several runs after the first."""
        return sum(map(len, self.tokens)) / self.best_seconds


@dataclass(frozen=True)
class Difference:
    """How far the logits of two frameworks are apart at the real tokens of the prompts."""

    first: Framework
    second: Framework
    absolute: float
    relative: float  # to the largest logit
    same_tokens: bool


def answer(
    framework: Framework,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    dtype: str | None = None,
    on_event: OnEvent = lambda event: None,
) -> Answer:
    """Lets one framework answer greedily, in a process of its own; raises OPTError."""
    found = run_greedily(
        framework,
        prompts,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        repeat=True,
        on_event=on_event,
    )
    return Answer(
        framework=framework,
        texts=tuple(prompts.decode(found.tokens)),
        tokens=found.tokens,
        logits=found.logits,
        load_seconds=found.reply.seconds["load"],
        first_seconds=found.reply.seconds["first run"],
        best_seconds=found.reply.seconds["best run"],
        peak_bytes=found.reply.peak_bytes,
    )


def compare(answers: Sequence[Answer]) -> list[Difference]:
    """Every pair of answers."""
    differences = []
    for first, second in combinations(answers, 2):
        absolute, relative = largest_difference(first.logits, second.logits)
        same = first.tokens == second.tokens
        differences.append(Difference(first.framework, second.framework, absolute, relative, same))
    return differences


def to_dict(
    prompts: Prompts, answers: Sequence[Answer], differences: Sequence[Difference]
) -> dict[str, Any]:
    """All of it as JSON, but for the logits."""
    shown = []
    for given in answers:
        fields = {f.name: getattr(given, f.name) for f in fields_of(given) if f.name != "logits"}
        shown.append({**fields, "tokens_per_second": given.tokens_per_second})
    return {
        "prompts": list(prompts.texts),
        "answers": shown,
        "differences": [asdict(difference) for difference in differences],
        "same_tokens": all(difference.same_tokens for difference in differences),
    }
