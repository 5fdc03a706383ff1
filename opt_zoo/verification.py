# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints compared: tensor by tensor, and, if asked, by what frameworks make of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conversion import Comparison
from conversion.verify import TensorComparison
from opt_core.errors import HubError, InputError
from opt_zoo.backends import BACKENDS, Framework
from opt_zoo.logits import largest_difference, run_greedily
from opt_zoo.processes import OnEvent
from opt_zoo.prompts import Prompts

NEW_TOKENS = 16

#: Shows how a worker of that title gets on.
Show = Callable[[str], AbstractContextManager[OnEvent]]


@dataclass(frozen=True)
class LogitsComparison:
    """How far two checkpoints' logits are apart in one framework, at the prompts' real tokens."""

    framework: Framework
    absolute: float  # nan for vocabularies of different sizes
    relative: float  # to the largest logit
    same_tokens: bool
    tokens: tuple[tuple[tuple[int, ...], ...], ...]  # [2 checkpoints][prompts][new tokens]


@dataclass(frozen=True)
class Verification:
    """All that was compared."""

    tensors: Comparison
    prompts: tuple[str, ...] = ()
    logits: tuple[LogitsComparison, ...] = ()  # one a framework; none if not asked for

    @property
    def different(self) -> list[TensorComparison]:
        """The tensors that are not bit-equal, the worst first."""
        found = [t for t in self.tensors.tensors if not t.equal]
        return sorted(found, key=lambda t: (-_badness(t), t.name))

    @property
    def passed(self) -> bool:
        """Whether the checkpoints are equal: bit by bit, or in what they say.

        Where logits were asked for, tensors in another dtype may differ, as long as every framework
        continues the prompts alike. Tensors in the same dtype, or that only one holds, may not.
        """
        compared = self.tensors
        if not self.logits:
            return compared.equal
        return (
            all(found.same_tokens for found in self.logits)
            and all(t.equal or t.dtypes[0] != t.dtypes[1] for t in compared.tensors)
            and not compared.only_first
            and not compared.only_second
        )


def relative_difference(tensor: TensorComparison) -> float:
    """The largest difference, relative to the largest absolute value of the first."""
    return tensor.difference / tensor.largest if tensor.largest else tensor.difference


def check_runnable(*models: str) -> None:
    """Raises InputError for a file: a framework loads a directory, perhaps from another file."""
    for model in models:
        if Path(model).expanduser().is_file():
            raise InputError(
                f"{model}: expected a directory or a hub name for --logits, found a file. Give the "
                "directory that holds it."
            )


def encode(first: str, second: str, texts: Sequence[str]) -> tuple[Prompts, Prompts]:
    """Prompts for each of two models, in the tokens of whichever has a tokenizer.

    Raises InputError if neither has one, OPTError for texts that cannot be encoded.
    """
    for model in (first, second):
        try:
            prompts = Prompts.encode(model, texts)
        except HubError:
            continue
        return prompts.for_model(first), prompts.for_model(second)
    raise InputError(
        f"{first} and {second}: expected a tokenizer in one of them for --logits, found none. Put "
        "its files (tokenizer.json, or vocab.json and merges.txt) there."
    )


def compare_logits(
    framework: Framework, first: Prompts, second: Prompts, show: Show
) -> LogitsComparison:
    """Runs both models in one framework, each in a process of its own; raises OPTError."""
    found = []
    for prompts, name in ((first, "first"), (second, "second")):
        with show(f"{BACKENDS[framework].title}, {name}") as on_event:
            found.append(
                run_greedily(framework, prompts, max_new_tokens=NEW_TOKENS, on_event=on_event)
            )
    a, b = found
    absolute, relative = largest_difference(a.logits, b.logits)
    same = a.tokens == b.tokens
    return LogitsComparison(framework, absolute, relative, same, (a.tokens, b.tokens))


def to_dict(found: Verification) -> dict[str, Any]:
    """All of it as JSON; a difference that is no number is None."""
    compared = found.tensors
    return {
        "first": str(compared.first),
        "second": str(compared.second),
        "passed": found.passed,
        "equal": compared.equal,
        "tensors": len(compared.tensors),
        "different": [_tensor_to_dict(tensor) for tensor in found.different],
        "only_first": compared.only_first,
        "only_second": compared.only_second,
        "prompts": found.prompts,
        "logits": [_finite(asdict(logits)) for logits in found.logits],
    }


def _tensor_to_dict(tensor: TensorComparison) -> dict[str, Any]:
    return _finite({**asdict(tensor), "relative": relative_difference(tensor)})


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _badness(tensor: TensorComparison) -> float:
    relative = relative_difference(tensor)
    return math.inf if math.isnan(relative) else relative
