# SPDX-License-Identifier: Apache-2.0
"""What a caller hands to `generate` that is no data: objects that run on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from opt_core.errors import InputError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.streaming import TextStreamer


@runtime_checkable
class Streamer(Protocol):
    """What tokens are pushed to as they are made."""

    def put(self, value: Any) -> None:
        """Takes the prompts [B, T] first, then the tokens [B] of each step, as numpy arrays.

        Prompts of embeddings alone have no columns: [B, 0].
        """

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
        if self.streamer is not None and not isinstance(self.streamer, Streamer):
            raise InputError(
                f"streamer: expected an object with the methods put(ids) and end(), found "
                f"{self.streamer!r}."
            )
        if isinstance(self.streamer, TextStreamer) and options.num_return_sequences > 1:
            raise InputError(
                "A TextStreamer prints one sequence: num_return_sequences=1, found "
                f"{options.num_return_sequences}."
            )
        if options.stop_strings is not None and self.tokenizer is None:
            raise InputError(
                "stop_strings needs the tokenizer: generate(..., tokenizer=tokenizer)."
            )

    def check_assistant(self, model: Any, positions: int, *, from_ids: bool) -> None:
        """Checks that the assistant, if there is one, can propose tokens for the model.

        Args:
            positions: of the position table that prompt and new tokens need.
            from_ids: whether the prompts are token ids and nothing else.

        Raises:
            InputError: it is no causal LM of the same framework, has another vocabulary or too short a
                position table, or cannot read the prompts.
        """
        assistant = self.assistant_model
        if assistant is None:
            return
        if not (isinstance(assistant, type(model)) or isinstance(model, type(assistant))):
            raise InputError(
                f"assistant_model: expected a model of the class {type(model).__name__}, found "
                f"{type(assistant).__name__}."
            )
        found, expected = assistant.config, model.config
        if found.vocab_size != expected.vocab_size:
            raise InputError(
                f"assistant_model: expected the model's vocabulary of {expected.vocab_size} tokens, "
                f"found {found.vocab_size}. Assistant and model must share their tokenizer."
            )
        if found.max_position_embeddings < positions:
            raise InputError(
                f"assistant_model: prompt and new tokens need {positions} positions, but its position "
                f"table has {found.max_position_embeddings} (max_position_embeddings). Shorten the "
                "prompt, lower max_new_tokens or leave out the assistant."
            )
        if not from_ids:
            raise InputError(
                "assistant_model: the assistant reads token ids, but the prompts are inputs_embeds or "
                "past_key_values, which belong to the model. Give input_ids alone."
            )


def _listed(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise InputError(f"{name}: expected a list, found {type(value).__name__}.")
    return tuple(value)


NO_HOOKS = Hooks()
