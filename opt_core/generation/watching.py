# SPDX-License-Identifier: Apache-2.0
"""What happens on the host after each step: results are recorded, tokens streamed, ends decided."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import InputError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.hooks import Hooks, StoppingCriterion
from opt_core.generation.plan import DecodePlan
from opt_core.generation.stopping import MaxTime, StopStrings


class Watch:
    """Follows a loop that runs step by step; arrays stay in the framework's own form.

    Args:
        to_numpy: turns an array of the framework into numpy's.
        repeat: repeats each row of such an array.

    Attributes:
        is_needed: whether there is anything to do; else a loop may run as a whole.
        scores, logits: [R, V] of each step, if asked for.
        attentions, hidden_states: of each call of the model, if asked for.
    """

    def __init__(
        self,
        options: GenerationConfig,
        hooks: Hooks,
        plan: DecodePlan[Any],
        to_numpy: Callable[[Any], NDArray[Any]],
        repeat: Callable[[Any, int], Any],
    ) -> None:
        self.options = options
        self.plan = plan
        self.repeat = repeat
        self.streamer = hooks.streamer
        self.to_numpy = to_numpy
        self.criteria = _criteria(options, hooks, to_numpy)
        self.tokens_seen = 0
        self.scores: list[Any] = []
        self.logits: list[Any] = []
        self.attentions: list[Any] = []
        self.hidden_states: list[Any] = []

    @property
    def is_needed(self) -> bool:
        return bool(
            self.streamer is not None or self.criteria or self.options.return_dict_in_generate
        )

    @property
    def sees_layers(self) -> bool:
        """Whether the model must be asked for attentions or hidden states."""
        wanted = self.options.output_attentions or self.options.output_hidden_states
        return wanted and self.options.return_dict_in_generate

    @property
    def records(self) -> dict[str, tuple[Any, ...]]:
        """What was recorded, by the names of the outputs."""
        names = ("scores", "logits", "attentions", "hidden_states")
        return {name: tuple(getattr(self, name)) for name in names if getattr(self, name)}

    def start(self, prompts: NDArray[Any] | None, count: int) -> None:
        """Before the first step: the prompts [B, T]; None for `count` prompts of embeddings alone."""
        if self.streamer is not None:
            self.streamer.put(np.empty((count, 0), np.int32) if prompts is None else prompts)

    def ran(self, attentions: Any, hidden_states: Any, columns: int) -> None:
        """After a call of the model, which has filled `columns` of its cache.

        Args:
            attentions: per layer [B or 2B, N, T, at least columns].
            hidden_states: per layer [B or 2B, T, D].
        """
        if self.options.output_attentions:
            self.attentions.append(self._rows(x[..., :columns] for x in attentions))
        if self.options.output_hidden_states:
            self.hidden_states.append(self._rows(hidden_states))

    def select(self, take: Callable[[Any], Any]) -> None:
        """Of the last call, only what `take` makes of each array was of use."""
        for calls in (self.attentions, self.hidden_states):
            calls[-1:] = [tuple(take(x) for x in layers) for layers in calls[-1:]]

    def forget(self, count: int) -> None:
        """The last calls were of no use."""
        for calls in (self.attentions, self.hidden_states):
            del calls[max(0, len(calls) - count) :]

    def split(self, count: int) -> None:
        """Of the last call, only the first `count` tokens were of use: shows each as a call."""
        for call in self.attentions[-1:]:
            queries, columns = call[0].shape[2:]
            before = columns - queries + 1
            self.attentions[-1:] = [
                tuple(x[:, :, i : i + 1, : before + i] for x in call) for i in range(count)
            ]
        for call in self.hidden_states[-1:]:
            self.hidden_states[-1:] = [tuple(x[:, i : i + 1] for x in call) for i in range(count)]

    def check_rows(self, count: int) -> None:
        """Raises InputError unless rows that run one after the other can be followed."""
        names = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        asked = [name for name in names if getattr(self.options, name)]
        if not self.options.return_dict_in_generate:
            asked = []
        if self.streamer is not None:
            asked.append("streamer")
        if count > 1 and asked:
            raise InputError(
                f"{asked[0]}: assisted decoding runs its {count} prompts one after the other, and only "
                "one can be followed. Give one prompt at a time."
            )

    def _rows(self, layers: Iterable[Any]) -> tuple[Any, ...]:
        """Without the rows that guide; the prompts' once for each row that they become."""
        halves = 2 if self.plan.is_guided else 1
        is_prefill = not self.tokens_seen
        repeats = self.plan.strategy.rows if is_prefill else 1
        kept = (x[: x.shape[0] // halves] for x in layers)
        return tuple(x if repeats == 1 else self.repeat(x, repeats) for x in kept)

    def chose(self, tokens: Any, scores: Any, logits: Any) -> NDArray[np.bool_]:
        """After a step: the rows [R, columns] with their new tokens, and the step's scores [R, V].

        Returns:
            [R], whether the criteria end a row.
        """
        self.tokens_seen += 1
        if self.options.return_dict_in_generate and self.options.output_scores:
            self.scores.append(scores)
        if self.options.return_dict_in_generate and self.options.output_logits:
            self.logits.append(logits)
        if self.streamer is not None:
            self.streamer.put(self.to_numpy(tokens[:, -1]))
        ends = np.zeros(tokens.shape[0], bool)
        for criterion in self.criteria:
            ends = ends | _verdict(criterion, tokens, scores, self.to_numpy)
        return ends

    def end(self) -> None:
        """After the last step."""
        if self.streamer is not None:
            self.streamer.end()


def _criteria(
    options: GenerationConfig, hooks: Hooks, to_numpy: Callable[[Any], NDArray[Any]]
) -> tuple[StoppingCriterion, ...]:
    own: list[StoppingCriterion] = []
    if options.max_time is not None:
        own.append(MaxTime(options.max_time, time.monotonic()))
    if options.stop_strings is not None:
        own.append(StopStrings(tuple(options.stop_strings), hooks.tokenizer, to_numpy))
    return (*own, *hooks.stopping_criteria)


def _verdict(
    criterion: StoppingCriterion,
    tokens: Any,
    scores: Any,
    to_numpy: Callable[[Any], NDArray[Any]],
) -> NDArray[np.bool_]:
    """Which rows a criterion ends: [] or [R].

    Raises:
        InputError: it says neither one truth value nor one for each row.
    """
    found = criterion(tokens, scores)
    is_plain = isinstance(found, bool | int | list | tuple | np.ndarray | np.generic | None)
    values = np.asarray(found if is_plain else to_numpy(found))
    if values.dtype.kind not in "biu" or values.shape not in ((), (tokens.shape[0],)):
        raise InputError(
            f"stopping_criteria: expected one truth value from {criterion!r}, or one for each of the "
            f"{tokens.shape[0]} rows, found {found!r}."
        )
    return values.astype(bool)
