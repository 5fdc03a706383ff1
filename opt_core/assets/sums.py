# SPDX-License-Identifier: Apache-2.0
"""Sums and differences of 0 to 99 in words: "forty-two plus seventeen is" asks for " fifty-nine".

All 20,000 problems are `a plus b` and `a minus b` for a and b from 0 to 99; below zero the answer is
" minus three". Of the 5,050 unordered pairs {a, b} a fifth, 1,010, are held out: neither a plus b, b plus
a, a minus b nor b minus a of such a pair is ever trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from opt_core.errors import InputError
from opt_core.inputs import IGNORED_LABEL
from opt_core.tokenizer import OPTTokenizer

LARGEST = 99

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

# As in OPT, where these are ids 0 to 3; only <pad> and </s> are special.
_FIRST_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]


@dataclass(frozen=True)
class TrainingData:
    """All problems as rows `</s> prompt answer </s>`, padded on the right.

    `input_ids` [P, T]; `labels` [P, T] are the same at the answer and the last `</s>`, not shifted, and
    IGNORED_LABEL elsewhere: a prompt is mostly chance, and nothing to learn.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]


def number_to_words(number: int) -> str:
    """Return a number from -999 to 999 in words: 42 is "forty-two", -3 "minus three".

    Raises InputError outside that range.
    """
    if not -999 <= number <= 999:
        raise InputError(f"expected a number from -999 to 999, found {number}")
    if number < 0:
        return f"minus {number_to_words(-number)}"
    if number < 20:
        return _SMALL[number]
    if number < 100:
        ones = f"-{_SMALL[number % 10]}" if number % 10 else ""
        return _TENS[number // 10 - 2] + ones
    rest = f" {number_to_words(number % 100)}" if number % 100 else ""
    return f"{_SMALL[number // 100]} hundred{rest}"


def problems(split: str) -> list[tuple[str, str]]:
    """Return (prompt, answer) of the split "train" or "test", sums and differences alike, in fixed order.

    A prompt and its answer, which begins with a space, make one text. Raises InputError for other names.
    """
    if split not in ("train", "test"):
        raise InputError(f"split={split!r}: expected 'train' or 'test'")
    held_out = _held_out_pairs()
    numbers = range(LARGEST + 1)
    return [
        (
            f"{number_to_words(a)} {word} {number_to_words(b)} is",
            f" {number_to_words(a + sign * b)}",
        )
        for a, b, (word, sign) in product(numbers, numbers, (("plus", 1), ("minus", -1)))
        if ((min(a, b), max(a, b)) in held_out) == (split == "test")
    ]


@cache
def _held_out_pairs() -> frozenset[tuple[int, int]]:
    """Return the fifth of the unordered pairs whose SHA-256 comes first: the same on every machine."""
    pairs = list(combinations_with_replacement(range(LARGEST + 1), 2))
    pairs.sort(key=lambda pair: sha256(f"{pair[0]} {pair[1]}".encode()).digest())
    return frozenset(pairs[: len(pairs) // 5])


def train_tokenizer() -> OPTTokenizer:
    """Return a byte-level BPE tokenizer trained on the training texts, the same on every machine.

    Each number word, with or without the space before it, is one token. All 256 bytes are tokens, so any
    text can be encoded. Unused tokens round the vocabulary up to a multiple of 8, as CTranslate2 asks.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # never reached: merging ends when every word is one token
        min_frequency=1,
        show_progress=False,
        special_tokens=_FIRST_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [prompt + answer for prompt, answer in problems("train")]
    engine.train_from_iterator([*texts, " ".join(_SMALL + _TENS)], trainer)
    model: dict[str, Any] = json.loads(engine.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    while len(vocab) % 8:
        vocab[f"madeupword{len(vocab):04d}"] = len(vocab)
    merges = [tuple(merge) for merge in model["merges"]]
    return OPTTokenizer(vocab, merges)


def encode_problems(
    tokenizer: OPTTokenizer, pairs: Sequence[tuple[str, str]], length: int | None = None
) -> TrainingData:
    """Encode problems for training, padded to `length` tokens or to the longest problem.

    Raises InputError if a problem is longer than `length`.
    """
    end = [tokenizer.eos_token_id]
    prompts = [tokenizer.encode(prompt) for prompt, _ in pairs]
    answers = [tokenizer.encode(text, add_special_tokens=False) + end for _, text in pairs]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    if length is not None and length < longest:
        raise InputError(f"length={length}: the longest problem has {longest} tokens")
    shape = (len(pairs), longest if length is None else length)
    input_ids = np.full(shape, tokenizer.pad_token_id, np.int64)
    labels = np.full(shape, IGNORED_LABEL, np.int64)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, stop = len(prompt), len(prompt) + len(answer)
        input_ids[row, :stop] = prompt + answer
        labels[row, start:stop] = answer
    return TrainingData(input_ids, labels)


def accuracy(answers: Sequence[str], generated: Sequence[str]) -> float:
    """Return the share of generated texts (without the prompt) that say the answer and nothing more."""
    pairs = zip(answers, generated, strict=True)
    right = [text.strip() == answer.strip() for answer, text in pairs]
    return sum(right) / len(right)
