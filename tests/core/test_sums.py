# SPDX-License-Identifier: Apache-2.0
"""The task of the embedded model: words, the split, its tokenizer, the training arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opt_core import InputError, OPTTokenizer
from opt_core.assets import TINY_SUMS
from opt_core.assets.sums import (
    accuracy,
    encode_problems,
    number_to_words,
    problems,
    train_tokenizer,
)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (198, "one hundred ninety-eight"),
        (-21, "minus twenty-one"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert number_to_words(number) == words


def test_numbers_that_have_no_words_are_refused() -> None:
    with pytest.raises(InputError, match="1000"):
        number_to_words(1000)


def test_splits_share_no_unordered_pair() -> None:
    def pairs(split: str) -> set[frozenset[str]]:
        prompts = [prompt.removesuffix(" is") for prompt, _ in problems(split)]
        return {frozenset(p.replace(" plus ", " minus ").split(" minus ")) for p in prompts}

    train, test = pairs("train"), pairs("test")
    assert len(problems("train")) + len(problems("test")) == 20_000
    assert not train & test
    assert (len(train), len(test)) == (4040, 1010)


def test_answers_are_right() -> None:
    value = {number_to_words(number): number for number in range(-99, 199)}
    for prompt, answer in problems("train") + problems("test"):
        a, operation, b, verb = prompt.split(" ")
        expected = value[a] + value[b] if operation == "plus" else value[a] - value[b]
        assert verb == "is" and value[answer.removeprefix(" ")] == expected


def test_the_split_is_the_same_everywhere() -> None:
    """The first held-out problems, as they were when the embedded model was trained."""
    assert [prompt for prompt, _ in problems("test")[:3]] == FIRST_HELD_OUT
    with pytest.raises(InputError, match="'train' or 'test'"):
        problems("valid")


FIRST_HELD_OUT = ["zero plus four is", "zero minus four is", "zero plus six is"]


def test_committed_tokenizer_is_what_training_gives(tmp_path: Path) -> None:
    for path in train_tokenizer().save_pretrained(tmp_path):
        assert path.read_bytes() == (TINY_SUMS / path.name).read_bytes()


def test_words_are_single_tokens_and_any_text_can_be_encoded() -> None:
    tokenizer = OPTTokenizer.from_pretrained(TINY_SUMS)
    assert len(tokenizer) % 8 == 0
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<s>", "<pad>", "</s>", "<unk>"]
    for number in range(100):
        for words in (number_to_words(number), f" {number_to_words(number)}"):
            assert len(tokenizer.tokenize(words)) == 1 + 2 * words.count("-")
    assert tokenizer.tokenize("two plus two is") == ["two", "Ġplus", "Ġtwo", "Ġis"]
    text = "Größe 😀\n"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_training_arrays() -> None:
    tokenizer = OPTTokenizer.from_pretrained(TINY_SUMS)
    pairs = [("one plus one is", " two"), ("forty-two minus ninety is", " minus forty-eight")]
    data = encode_problems(tokenizer, pairs, length=16)
    assert data.input_ids.shape == data.labels.shape == (2, 16)
    for row, (prompt, answer) in enumerate(pairs):
        counted = data.labels[row] != -100
        assert np.array_equal(data.labels[row][counted], data.input_ids[row][counted])
        assert tokenizer.decode(data.labels[row][counted]) == f"{answer}</s>"
        real = data.input_ids[row] != tokenizer.pad_token_id
        assert tokenizer.decode(data.input_ids[row][real]) == f"</s>{prompt}{answer}</s>"
    with pytest.raises(InputError, match="longest problem"):
        encode_problems(tokenizer, pairs, length=5)


def test_accuracy_counts_whole_answers() -> None:
    assert accuracy([" two", " three"], ["two", " three hundred"]) == 0.5
