# SPDX-License-Identifier: Apache-2.0
"""What a caller hands to `generate` that is no data: objects that run on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Protocol

from opt_core.errors import InputError
from opt_core.generation.config import GenerationConfig


class Streamer(Protocol):
    """What tokens are pushed to as they are made."""

    def put(self, value: Any) -> None:
        """Takes the prompts [B, T] first, then the tokens [B] of each step, as numpy arrays."""

    def end(self) -> None:
        """Is called after the last tokens."""


#: `criterion(token ids [R, columns], scores [R, V])` -> whether to stop: one bool, or one per row.
StoppingCriterion = Callable[..., Any]


@dataclass(frozen=True)
class Hooks:
    """The objects among the arguments of `generate`, each None or empty where not given."""

    logits_processor: Iterable[Callable[..., Any]] = ()
    stopping_criteria: Iterable[StoppingCriterion] = ()
    prefix_allowed_tokens_fn: Callable[..., Any] | None = None
    constraints: Iterable[Any] = ()
    assistant_model: Any = None
    streamer: Streamer | None = None
    tokenizer: Any = None

    def __post_init__(self) -> None:
        for name in ("logits_processor", "stopping_criteria", "constraints"):
            object.__setattr__(self, name, _listed(name, getattr(self, name)))
        functions = {"prefix_allowed_tokens_fn": self.prefix_allowed_tokens_fn}
        for name in ("logits_processor", "stopping_criteria"):
            functions |= {f"{name}[{i}]": f for i, f in enumerate(getattr(self, name))}
        for name, function in functions.items():
            if function is not None and not callable(function):
                raise InputError(f"{name}: expected a function, found {function!r}.")

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> Hooks:
        """The objects among the arguments, which are then taken out of them."""
        names = [field.name for field in fields(cls) if field.name in arguments]
        return cls(**{name: arguments.pop(name) for name in names})

    def check(self, options: GenerationConfig) -> None:
        """Raises InputError where an object and the options need each other, or exclude each other."""
        if self.streamer is not None and options.num_beams > 1:
            raise InputError(
                "A streamer cannot follow beams, which change their past: num_beams=1."
            )
        if options.stop_strings is not None and self.tokenizer is None:
            raise InputError(
                "stop_strings needs the tokenizer: generate(..., tokenizer=tokenizer)."
            )


def _listed(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise InputError(f"{name}: expected a list, found {type(value).__name__}.")
    return tuple(value)


NO_HOOKS = Hooks()
