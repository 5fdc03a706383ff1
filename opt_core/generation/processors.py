# SPDX-License-Identifier: Apache-2.0
"""The logits processors as data: what to do to the scores, without a line of tensor code.

Each backend's `generation/processors.py` says how, under the same names. Pads are not part of a row:
no processor counts, compares or forbids because of them. A *column* counts from the first column of
the prompts as they were given, their padding included.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import InputError
from opt_core.generation.numbers import NUMBER


class Endings(NamedTuple):
    """What n sequences say of the tokens that complete them, as tuples of numbers.

    Short prefixes are filled up with -1 on the left.
    """

    prefixes: tuple[tuple[int, ...], ...]  # [n, longest] the tokens before the last
    lengths: tuple[int, ...]  # [n] tokens that a row must have
    tokens: tuple[int, ...]  # [n] the last
    biases: tuple[float, ...]  # [n]


@dataclass(frozen=True)
class LogitsProcessor:
    """One change to the scores [B, V] of the next token."""


@dataclass(frozen=True)
class HostProcessor(LogitsProcessor):
    """A processor that runs code of the caller, which no compiled loop can hold."""

    function: Callable[..., Any]


@dataclass(frozen=True)
class Guidance(LogitsProcessor):
    """Moves log-probabilities away from those without the prompt (classifier-free guidance).

    `unconditional + scale * (scores - unconditional)`, both as log-probabilities (arXiv:2306.17806).
    """

    scale: float = field(metadata=NUMBER)


@dataclass(frozen=True)
class SequenceBias(LogitsProcessor):
    """Adds a bias to the last token of each sequence where the row ends with what stands before it.

    As in the reference, a row must have as many tokens as the whole sequence, unless it is one token.
    """

    biases: tuple[tuple[tuple[int, ...], float], ...] = field(metadata=NUMBER)  # (token ids, bias)

    def endings(self) -> Endings:
        """The sequences, each taken apart."""
        sequences = [ids for ids, _ in self.biases]
        width = max(map(len, sequences))
        return Endings(
            tuple((-1,) * (width - len(ids)) + ids[:-1] for ids in sequences),
            tuple(len(ids) if len(ids) > 1 else 0 for ids in sequences),
            tuple(ids[-1] for ids in sequences),
            tuple(bias for _, bias in self.biases),
        )


@dataclass(frozen=True)
class Diversity(LogitsProcessor):
    """Subtracts `penalty` for each time that earlier beam groups chose the token at this step."""

    penalty: float = field(metadata=NUMBER)


@dataclass(frozen=True)
class PromptRepetitionPenalty(LogitsProcessor):
    """Multiplies positive scores of the prompt's tokens, and divides negative ones."""

    penalty: float = field(metadata=NUMBER)


@dataclass(frozen=True)
class RepetitionPenalty(LogitsProcessor):
    """Divides positive scores of tokens already in the row, and multiplies negative ones (CTRL)."""

    penalty: float = field(metadata=NUMBER)


@dataclass(frozen=True)
class NoRepeatNGram(LogitsProcessor):
    """No sequence of `size` tokens a second time in a row."""

    size: int


@dataclass(frozen=True)
class MinLength(LogitsProcessor):
    """No end of sequence before the row has `length` columns."""

    length: int = field(metadata=NUMBER)
    eos_token_ids: tuple[int, ...] = field(metadata=NUMBER)


@dataclass(frozen=True)
class MinNewTokens(LogitsProcessor):
    """No end of sequence before `count` new tokens."""

    count: int = field(metadata=NUMBER)
    eos_token_ids: tuple[int, ...] = field(metadata=NUMBER)


@dataclass(frozen=True)
class PrefixAllowed(HostProcessor):
    """Only the tokens of the list `function(prompt number, token ids of the row)`."""

    rows_per_prompt: int

    def allowed(self, row: int, token_ids: Any, vocab_size: int) -> NDArray[np.bool_]:
        """Which tokens [V] may follow those of a row.

        Raises:
            InputError: the function returns no list of ids, or none, or one outside the vocabulary.
        """
        prompt = row // self.rows_per_prompt
        returned = self.function(prompt, token_ids)
        try:
            found = [operator.index(token) for token in returned]
        except TypeError as error:
            raise InputError(
                f"prefix_allowed_tokens_fn: expected a list of token ids, found {returned!r} for prompt "
                f"{prompt} after {len(token_ids)} tokens."
            ) from error
        if not found or not 0 <= min(found) <= max(found) < vocab_size:
            raise InputError(
                f"prefix_allowed_tokens_fn: expected ids from 0 to {vocab_size - 1}, at least one, "
                f"found {found[:9]} for prompt {prompt} after {len(token_ids)} tokens. Where nothing "
                "may follow, allow the eos_token_id."
            )
        allowed = np.zeros(vocab_size, bool)
        allowed[found] = True
        return allowed


@dataclass(frozen=True)
class ForcedBOS(LogitsProcessor):
    """Nothing but `token_id` after a single column."""

    token_id: int = field(metadata=NUMBER)


@dataclass(frozen=True)
class ForcedEOS(LogitsProcessor):
    """Nothing but the `token_ids`, all with score 0, as the last of the tokens allowed."""

    token_ids: tuple[int, ...] = field(metadata=NUMBER)


@dataclass(frozen=True)
class RemoveInvalid(LogitsProcessor):
    """0 for NaN, the highest and the lowest finite number for the infinities."""


@dataclass(frozen=True)
class LengthDecay(LogitsProcessor):
    """Raises the scores of the ends by `|score| (factor ** n - 1)`, n tokens after `start` new ones.

    An end that is forbidden (-inf) stays so; in the reference it becomes NaN.
    """

    start: int
    factor: float
    eos_token_ids: tuple[int, ...] = field(metadata=NUMBER)

    def gains(self, count: int) -> NDArray[np.float32]:
        """What the scores' sizes are multiplied by before they are added, in each of `count` steps."""
        n = np.maximum(np.arange(count) - self.start, 0)
        with np.errstate(over="ignore"):
            return (np.float64(self.factor) ** n - 1.0).astype(np.float32)


@dataclass(frozen=True)
class Suppress(LogitsProcessor):
    """None of these tokens."""

    token_ids: tuple[int, ...] = field(metadata=NUMBER)


@dataclass(frozen=True)
class SuppressAtBegin(LogitsProcessor):
    """None of these tokens as the new token number `step`, counted from 0."""

    token_ids: tuple[int, ...] = field(metadata=NUMBER)
    step: int = field(metadata=NUMBER)


@dataclass(frozen=True)
class ForceTokens(LogitsProcessor):
    """Nothing but a certain token in certain columns."""

    tokens: tuple[tuple[int, int], ...] = field(metadata=NUMBER)  # (column, token id)


@dataclass(frozen=True)
class UserDefined(HostProcessor):
    """`function(token ids [B, columns], scores [B, V])` -> scores, in the framework's own arrays."""

    def called(self, tokens: Any, scores: Any) -> Any:
        """What the function returns.

        Raises:
            InputError: it is no array of the shape of the scores.
        """
        found = self.function(tokens, scores)
        if np.shape(found) != tuple(scores.shape):
            raise InputError(
                f"logits_processor: expected scores {tuple(scores.shape)} from {self.function!r}, "
                f"found {type(found).__name__} {np.shape(found)}. Return the scores, changed or not."
            )
        return found


@dataclass(frozen=True)
class Renormalize(LogitsProcessor):
    """Log-probabilities of the scores."""


@dataclass(frozen=True)
class Temperature(LogitsProcessor):
    """Divides the scores."""

    temperature: float = field(metadata=NUMBER)


@dataclass(frozen=True)
class TopK(LogitsProcessor):
    """Keeps the `k` highest scores (and those equal to the lowest of them)."""

    k: int


@dataclass(frozen=True)
class TopP(LogitsProcessor):
    """Keeps the fewest highest scores whose probabilities sum to at least `p`; `keep` at least.

    Those equal to the lowest of them are kept too, so that no order of sorting decides.
    """

    p: float = field(metadata=NUMBER)
    keep: int = 1


@dataclass(frozen=True)
class MinP(LogitsProcessor):
    """Keeps tokens at least `p` times as likely as the likeliest; `keep` at least (arXiv:2407.01082)."""

    p: float = field(metadata=NUMBER)
    keep: int = 1


@dataclass(frozen=True)
class Typical(LogitsProcessor):
    """Keeps the tokens of nearly average surprise with `mass` probability; `keep` at least.

    arXiv:2202.00666.
    """

    mass: float = field(metadata=NUMBER)
    keep: int = 1


@dataclass(frozen=True)
class Epsilon(LogitsProcessor):
    """Keeps tokens of at least this probability; the `keep` likeliest always (arXiv:2210.15191)."""

    cutoff: float = field(metadata=NUMBER)
    keep: int = 1


@dataclass(frozen=True)
class Eta(LogitsProcessor):
    """Keeps tokens of at least min(cutoff, sqrt(cutoff) exp(-entropy)); the `keep` likeliest always.

    arXiv:2210.15191.
    """

    cutoff: float = field(metadata=NUMBER)
    keep: int = 1


#: In the order in which they are applied.
PROCESSORS = (
    Guidance,
    SequenceBias,
    Diversity,
    PromptRepetitionPenalty,
    RepetitionPenalty,
    NoRepeatNGram,
    MinLength,
    MinNewTokens,
    PrefixAllowed,
    ForcedBOS,
    ForcedEOS,
    RemoveInvalid,
    LengthDecay,
    Suppress,
    SuppressAtBegin,
    ForceTokens,
    UserDefined,
    Temperature,
    TopK,
    TopP,
    MinP,
    Typical,
    Epsilon,
    Eta,
    Renormalize,
)
