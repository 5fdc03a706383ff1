# SPDX-License-Identifier: Apache-2.0
"""Constraints: what must appear in a sequence, and how far a row has come with its list of them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

from opt_core.errors import InputError

#: More tokens than this complete no constraint that ends.
MOST_TOKENS = 10_000


class Constraint(ABC):
    """Something that a sequence must fulfil token by token: the parent of a caller's own ones.

    The protocol is that of transformers 4.37.2 (`generation/beam_constraints.py`). Feeding tokens of
    `advance` to `update` must complete a constraint sooner or later.

    Attributes:
        seqlen: the highest number of tokens that complete it.
        alternatives: the words one of which completes it, where it consists of words.
    """

    seqlen: int
    alternatives: Sequence[Sequence[int]] = ()

    @abstractmethod
    def advance(self) -> int | Iterable[int] | None:
        """The token or tokens that lead one step on; None after the last."""

    @abstractmethod
    def does_advance(self, token_id: int) -> bool:
        """Whether a token leads one step on."""

    @abstractmethod
    def update(self, token_id: int) -> tuple[bool, bool, bool]:
        """Takes note of the row's next token.

        Returns:
            Whether it led one step on, whether it completed the constraint, and whether it broke off
            what was begun, so that the constraint starts anew.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forgets all tokens."""

    @abstractmethod
    def remaining(self) -> int:
        """The number of steps still to make."""

    @abstractmethod
    def copy(self, stateful: bool = False) -> Self:
        """The same constraint in its first state, or with `stateful` in its present one."""


class PhrasalConstraint(Constraint):
    """These tokens in this order, with nothing in between.

    Raises:
        InputError: no list of token ids.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = _word("token_ids", token_ids)
        self.alternatives = (self.token_ids,)
        self.seqlen = len(self.token_ids)
        self.fulfilled = 0  # of the tokens

    @property
    def completed(self) -> bool:
        return self.fulfilled == self.seqlen

    def advance(self) -> int | None:
        return None if self.completed else self.token_ids[self.fulfilled]

    def does_advance(self, token_id: int) -> bool:
        return self.advance() == token_id

    def update(self, token_id: int) -> tuple[bool, bool, bool]:
        if not self.does_advance(token_id):
            self.reset()
            return False, False, True
        self.fulfilled += 1
        return True, self.completed, False

    def reset(self) -> None:
        self.fulfilled = 0

    def remaining(self) -> int:
        return self.seqlen - self.fulfilled

    def copy(self, stateful: bool = False) -> Self:
        copied = copy.copy(self)
        if not stateful:
            copied.reset()
        return copied


class DisjunctiveConstraint(Constraint):
    """One of several words, each a list of tokens without anything in between.

    Raises:
        InputError: no list of words, or a word that another one begins with.
    """

    def __init__(self, nested_token_ids: Sequence[Sequence[int]]) -> None:
        if not isinstance(nested_token_ids, list | tuple) or not nested_token_ids:
            raise InputError(
                f"nested_token_ids: expected a list of words, found {nested_token_ids!r}."
            )
        named = enumerate(nested_token_ids)
        self.token_ids = tuple(_word(f"nested_token_ids[{i}]", word) for i, word in named)
        _check_beginnings(self.token_ids)
        self.alternatives = self.token_ids
        self.seqlen = max(map(len, self.token_ids))
        self.current_seq: list[int] = []
        self.completed = False

    def advance(self) -> list[int]:
        size = len(self.current_seq)
        open_words = [w for w in self.token_ids if list(w[:size]) == self.current_seq]
        return list(dict.fromkeys(word[size] for word in open_words if len(word) > size))

    def does_advance(self, token_id: int) -> bool:
        return token_id in self.advance()

    def update(self, token_id: int) -> tuple[bool, bool, bool]:
        if not self.does_advance(token_id):
            self.reset()
            return False, False, True
        self.current_seq.append(token_id)
        self.completed = not self.advance()
        return True, self.completed, False

    def reset(self) -> None:
        self.current_seq = []
        self.completed = False

    def remaining(self) -> int:
        return 0 if self.completed else self.seqlen - len(self.current_seq)

    def copy(self, stateful: bool = False) -> Self:
        """As in the reference, a stateful copy shares what is added to `current_seq` from then on.

        Of several words that go on from there, only the first proposed counts as a step forward.
        """
        copied = copy.copy(self)
        if not stateful:
            copied.reset()
        return copied


@dataclass(frozen=True)
class Progress:
    """How far a row has come: constraints are fulfilled one at a time, in any order.

    A word that breaks off starts anew with the token after that which broke it.

    Attributes:
        longest: `seqlen` of the longest constraint.
        pending: constraints not begun, in their first state, which is never changed.
        current: the one begun.
        seen: the tokens that it has seen.
        completed: how many are fulfilled.
    """

    longest: int
    pending: tuple[Constraint, ...]
    current: Constraint | None = None
    seen: tuple[int, ...] = ()
    completed: int = 0

    @classmethod
    def start(cls, constraints: Sequence[Constraint], tokens: Iterable[int] = ()) -> Progress:
        """The progress of a row of these tokens."""
        longest = max(constraint.seqlen for constraint in constraints)
        progress = cls(longest, tuple(constraint.copy() for constraint in constraints))
        for token in tokens:
            progress = progress.after(token)
        return progress

    @property
    def is_complete(self) -> bool:
        return self.current is None and not self.pending

    @property
    def bank(self) -> int:
        """The steps made, each fulfilled constraint counted as the longest (arXiv:1804.06609)."""
        begun = 0 if self.current is None else self.longest - self.current.remaining()
        return self.completed * self.longest + begun

    @property
    def fewest(self) -> int:
        """No fewer tokens fulfil what is left."""
        count = sum(min(map(len, c.alternatives), default=1) for c in self.pending)
        if self.current is None:
            return count
        size = len(self.seen)
        ends = [w[size:] for w in self.current.alternatives if tuple(w[:size]) == self.seen]
        return count + min(map(len, ends), default=1)

    def after(self, token: int) -> Progress:
        """The progress with one more token."""
        return self._after(token, self._current())

    def proposals(self) -> list[tuple[int, int]]:
        """The tokens that lead on, each with the bank that it leads to."""
        current = self._current()
        sources = self.pending if current is None else (current,)
        tokens = [token for constraint in sources for token in next_tokens(constraint)]
        # Banks are asked for after all copies have been changed: they may share their tokens.
        copies = [None if current is None else current.copy(stateful=True) for _ in tokens]
        states = [self._after(*step) for step in zip(tokens, copies, strict=True)]
        return [(token, state.bank) for token, state in zip(tokens, states, strict=True)]

    def _current(self) -> Constraint | None:
        """An instance, which may be changed, of the constraint begun.

        Replayed instead of copied with its state, since copies may share it.
        """
        if self.current is None:
            return None
        current = self.current.copy()
        for token in self.seen:
            current.update(token)
        return current

    def _after(self, token: int, current: Constraint | None) -> Progress:
        if current is None:
            return self._begun(token)
        _, is_completed, is_reset = current.update(token)
        if is_completed:
            return replace(self, current=None, seen=(), completed=self.completed + 1)
        if is_reset:
            return replace(self, current=None, seen=(), pending=(*self.pending, current.copy()))
        return replace(self, current=current, seen=(*self.seen, token))

    def _begun(self, token: int) -> Progress:
        """With the first of the pending constraints that the token leads on."""
        for index, constraint in enumerate(self.pending):
            if constraint.does_advance(token):
                rest = replace(self, pending=self.pending[:index] + self.pending[index + 1 :])
                return rest._after(token, constraint.copy())
        return self


def next_tokens(constraint: Constraint) -> list[int]:
    """The tokens that lead on, as a list."""
    tokens = constraint.advance()
    if tokens is None:
        return []
    return [int(token) for token in tokens] if isinstance(tokens, Iterable) else [int(tokens)]


def read_constraints(
    given: Iterable[Any], words: Iterable[Any] | None, vocab_size: int
) -> tuple[Constraint, ...]:
    """The constraints that a caller gives, then those of `force_words_ids`.

    Raises:
        InputError: objects that are no constraints, or cannot be fulfilled, or words that none can be
            made of, or token ids outside the vocabulary.
    """
    for index, constraint in enumerate(given):
        if not isinstance(constraint, Constraint):
            raise InputError(
                f"constraints[{index}]: expected a PhrasalConstraint, a DisjunctiveConstraint or an "
                f"object of a class derived from opt_core.Constraint, found {constraint!r}."
            )
    forced = [
        PhrasalConstraint(word) if isinstance(word[0], int) else DisjunctiveConstraint(word)
        for word in words or ()
    ]
    for constraint in (*given, *forced):
        _check_protocol(constraint, vocab_size)
    return (*given, *forced)


def _check_protocol(constraint: Constraint, vocab_size: int) -> None:
    """Raises InputError unless following `advance` completes the constraint."""
    name = type(constraint).__name__
    used = [token for word in constraint.alternatives for token in word]
    probe = constraint.copy()
    is_completed, count = False, 0
    while not is_completed:
        tokens = next_tokens(probe)
        if not tokens or count == MOST_TOKENS:
            raise InputError(
                f"{name}: update() reported no completion after {count} tokens of advance(), the "
                f"last of which gave {tokens}. Both must lead to the end."
            )
        _check_ids(name, [*used, *tokens], vocab_size)
        if not probe.does_advance(tokens[0]):
            raise InputError(f"{name}: does_advance({tokens[0]}) denies what advance() proposes.")
        is_stepped, is_completed, _ = probe.update(tokens[0])
        if not is_stepped:
            raise InputError(f"{name}: update({tokens[0]}) denies what advance() proposes.")
        count += 1


def _check_ids(name: str, tokens: Sequence[int], vocab_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise InputError(
                f"{name}: token {token} lies outside the vocabulary of {vocab_size} tokens."
            )


def _word(name: str, token_ids: Any) -> tuple[int, ...]:
    is_list = isinstance(token_ids, list | tuple) and len(token_ids) > 0
    if not is_list or not all(isinstance(t, int) and t >= 0 for t in token_ids):
        raise InputError(
            f"{name}: expected a list of token ids, not empty, found {token_ids!r}. "
            "tokenizer(word, add_special_tokens=False).input_ids gives those of a word."
        )
    return tuple(token_ids)


def _check_beginnings(words: Sequence[tuple[int, ...]]) -> None:
    ordered = sorted(words)
    for word, following in pairwise(ordered):
        if following[: len(word)] == word:
            raise InputError(
                f"nested_token_ids: {list(following)} begins with {list(word)}, so that after the "
                "latter nothing tells which of the two is meant. Leave out one of them."
            )
