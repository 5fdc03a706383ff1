# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer hands to a model: rows of tokens, how they are cut and padded, and arrays of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np

from opt_core.errors import InputError

# return_tensors -> (module, constructor from a numpy array, integer type, extra that installs it).
_FRAMEWORKS = {
    "pt": ("torch", "from_numpy", "int64", "torch"),
    "tf": ("tensorflow", "constant", "int32", "tf"),
    "jax": ("jax.numpy", "asarray", "int32", "flax"),
}

# Keys that grow along with input_ids, and the value that stands at a pad.
_PAD_VALUES: dict[str, Any] = {
    "attention_mask": 0,
    "special_tokens_mask": 1,
    "offset_mapping": (0, 0),
}


class Token(NamedTuple):
    """One token of a row: `span` counts characters; `word` and `sequence` are None for special tokens."""

    id: int
    text: str
    span: tuple[int, int] = (0, 0)
    word: int | None = None
    sequence: int | None = None
    is_special: bool = True
    is_pad: bool = False


class BatchEncoding(dict[str, Any]):
    """A plain dict of model inputs (`model(**encoding)`) that remembers where each token came from.

    Keys are also attributes: `encoding.input_ids`. Without `return_tensors` a single text gives flat
    lists and a batch gives lists of lists; with it, every value is an array `[B, T]`.
    """

    def __init__(
        self, data: Mapping[str, Any] = MappingProxyType({}), rows: Sequence[Sequence[Token]] = ()
    ) -> None:
        super().__init__(data)  # none of it where TensorFlow makes another of the kind
        self._rows = rows

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no key {name!r} in this encoding, only {list(self)}") from None

    def to(self, device: Any) -> Self:
        """Move every torch tensor to `device`, in place as in transformers, and return the encoding."""
        for key, value in self.items():
            if not hasattr(value, "to"):
                raise InputError(
                    f"cannot move {key} ({type(value).__name__}) to {device}: only torch tensors move; "
                    "ask for them with return_tensors='pt'"
                )
            self[key] = value.to(device)
        return self

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Return the token strings of one row, pads included."""
        return [token.text for token in self._row(batch_index)]

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Return 0 for tokens of the first text, 1 for those of the second, None for special tokens."""
        return [token.sequence for token in self._row(batch_index)]

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Return for each token the index of its word in its text, None for special tokens."""
        return [token.word for token in self._row(batch_index)]

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """Return the position of the token that covers a character, or None if no token does.

        With one index it is the character's and the row is the first; with two, row and character.
        """
        row, char = (
            (0, batch_or_char_index) if char_index is None else (batch_or_char_index, char_index)
        )
        for position, token in enumerate(self._row(row)):
            if token.sequence == sequence_index and token.span[0] <= char < token.span[1]:
                return position
        return None

    def _row(self, index: int) -> Sequence[Token]:
        if not -len(self._rows) <= index < len(self._rows):
            raise InputError(
                f"no row {index}: this encoding remembers the tokens of {len(self._rows)} rows "
                "(results of pad() remember none; encode the texts with padding=True instead)"
            )
        return self._rows[index]


def as_pairs(text: Any, pair: Any) -> tuple[bool, list[str], list[str | None]]:
    """Return whether a single text came, the first texts, and the second ones (None where none came).

    Raises InputError for anything but a text, a pair, or a list of either.
    """
    if isinstance(text, str):
        if not (pair is None or isinstance(pair, str)):
            raise InputError(
                f"text is one string, text_pair must be too, found {type(pair).__name__}"
            )
        return True, [text], [pair]
    if not isinstance(text, Sequence):
        raise InputError(f"expected a text, a pair or a list of them, found {type(text).__name__}")
    if pair is None:
        pairs = [(item, None) if isinstance(item, str) else item for item in text]
    elif isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == len(text):
        pairs = list(zip(text, pair, strict=True))
    else:
        raise InputError(f"text is a list of {len(text)} texts, text_pair must be one as long")
    for position, item in enumerate(pairs):
        if not (
            isinstance(item, Sequence)
            and len(item) == 2
            and isinstance(item[0], str)
            and (item[1] is None or isinstance(item[1], str))
        ):
            raise InputError(
                f"item {position} of the batch: expected a text or a pair, found {item!r}"
            )
    return False, [first for first, _ in pairs], [second for _, second in pairs]


def fit(
    first: list[Token],
    second: list[Token],
    room: int,
    strategy: str,
    side: str,
    stride: int | None,
) -> list[tuple[list[Token], list[Token]]]:
    """Return both texts cut at `side` so that they fill at most `room` tokens together.

    "longest_first" shortens the longer text to the length of the other, then both in turn, where an odd
    token comes off the second. With a `stride`, further windows of the text that was cut follow, each
    sharing `stride` tokens with the one before. Raises InputError where that cannot be done.
    """
    excess = len(first) + len(second) - room
    if excess <= 0:
        return [(first, second)]
    cuts = _share(len(first), len(second), excess, strategy)
    for name, tokens, cut in zip(("first", "second"), (first, second), cuts, strict=True):
        if cut > len(tokens):
            raise InputError(
                f"truncation={strategy!r} must drop {cut} tokens, but the {name} text has only "
                f"{len(tokens)}; raise max_length or use truncation='longest_first'"
            )
    if stride is None:
        return [(_cut(first, cuts[0], side), _cut(second, cuts[1], side))]
    if min(cuts) > 0 or (second and strategy == "longest_first"):
        raise InputError(
            "return_overflowing_tokens of a pair needs to know which text to cut: "
            "use truncation='only_first' or 'only_second'"
        )
    if cuts[0]:
        return [(part, second) for part in _windows(first, len(first) - excess, stride, side)]
    return [(first, part) for part in _windows(second, len(second) - excess, stride, side)]


def _share(first: int, second: int, excess: int, strategy: str) -> tuple[int, int]:
    """Return how many tokens come off each text."""
    if strategy == "only_first" or (strategy == "longest_first" and second == 0):
        return excess, 0
    if strategy == "only_second":
        return 0, excess
    levelled = min(abs(first - second), excess)
    off_second = excess - levelled - (excess - levelled) // 2
    if first <= second:
        off_second += levelled
    return excess - off_second, off_second


def _cut(tokens: list[Token], count: int, side: str) -> list[Token]:
    return tokens[count:] if side == "left" else tokens[: len(tokens) - count]


def _windows(tokens: list[Token], width: int, stride: int, side: str) -> list[list[Token]]:
    if not 0 <= stride < width:
        raise InputError(
            f"stride={stride} must be less than the {width} tokens of the text that fit into a row; "
            "lower stride or raise max_length"
        )
    starts = range(0, len(tokens) - stride, width - stride)
    if side == "left":
        return [tokens[max(len(tokens) - n - width, 0) : len(tokens) - n] for n in starts]
    return [tokens[n : n + width] for n in starts]


def pad_tokens(row: list[Token], length: int, side: str, pad: Token) -> list[Token]:
    """Return the row with pads at `side` up to `length`; a longer row stays as it is."""
    pads = [pad] * (length - len(row))
    return pads + row if side == "left" else row + pads


def pad_lists(
    data: Mapping[str, list[Any]], length: int, side: str, pad_id: int
) -> dict[str, list[Any]]:
    """Return the rows of a batch padded to `length`; keys that do not run along with the ids stay."""
    fill = {"input_ids": pad_id, **_PAD_VALUES}
    padded = dict(data)
    for key in data.keys() & fill.keys():
        pads = [[fill[key]] * (length - len(ids)) for ids in data["input_ids"]]
        pairs = zip(pads, data[key], strict=True)
        padded[key] = [pad + row if side == "left" else row + pad for pad, row in pairs]
    return padded


def to_tensors(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return every value of a batch as an integer array `[B, T, ...]` of the framework `name`.

    Raises InputError for an unknown name or rows of unequal length, ImportError if the framework is
    not installed.
    """
    if name == "np":
        return {key: _rectangle(key, value, "int64") for key, value in data.items()}
    if name not in _FRAMEWORKS:
        raise InputError(
            f"return_tensors={name!r}: expected one of {['np', *_FRAMEWORKS]}, or None for lists"
        )
    module, constructor, dtype, extra = _FRAMEWORKS[name]
    try:
        construct = getattr(importlib.import_module(module), constructor)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f"return_tensors={name!r} needs {error.name}, which is not installed; "
            f"run: pip install 'opt-zoo[{extra}]'"
        ) from error
    return {key: construct(_rectangle(key, value, dtype)) for key, value in data.items()}


def _rectangle(key: str, rows: Sequence[Any], dtype: str) -> np.ndarray[Any, Any]:
    lengths = sorted({len(row) for row in rows if isinstance(row, Sequence)})
    if len(lengths) > 1:
        raise InputError(
            f"{key}: rows of {lengths[0]} to {lengths[-1]} tokens make no array; pass padding=True "
            "(and truncation=True with max_length=... to shorten the longest)"
        )
    return np.asarray(rows, dtype=dtype)


def to_lists(ids: Any) -> Any:
    """Return ids as an int or nested lists of ints, from any framework's arrays or plain Python."""
    if isinstance(ids, list | tuple):
        return [to_lists(item) for item in ids]
    if hasattr(ids, "tolist"):
        return ids.tolist()
    return ids if isinstance(ids, int) else np.asarray(ids).tolist()
