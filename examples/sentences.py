# SPDX-License-Identifier: Apache-2.0
"""Texts with labels: read from a file, or sums in words that are to be sorted by the size of the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.json_lines import Line, read_lines
from examples.training import Array
from opt_core import OPTTokenizer
from opt_core.assets.sums import number_to_words, problems


@dataclass(frozen=True)
class Sentence:
    """A text, its label, and where both were read."""

    text: str
    label: str
    place: str = "generated"


@dataclass(frozen=True)
class SentenceRows:
    """`input_ids` [rows, T], padded on the right, and `labels` [rows], numbers of classes."""

    input_ids: Array
    labels: Array


def generate(split: str) -> list[Sentence]:
    """The problems of the embedded model; it never saw those of the split "test"."""
    values = {f" {number_to_words(number)}": number for number in range(-99, 199)}

    def size(number: int) -> str:
        return "negative" if number < 0 else ("small", "medium", "large")[len(str(number)) - 1]

    return [Sentence(prompt, size(values[answer])) for prompt, answer in problems(split)]


def read_sentences(path: Path) -> list[Sentence]:
    """Lines `{"text": ..., "label": ...}`; a label is a text, a whole number, true or false."""
    return [Sentence(line.text("text"), _label(line), line.place) for line in read_lines(path)]


def _label(line: Line) -> str:
    label = line.entries.get("label")
    if isinstance(label, int):
        return json.dumps(label)
    return line.text("label")


def label_ids(rows: list[Sentence]) -> dict[str, int]:
    """The labels in alphabetical order, numbered; a single one is nothing to learn."""
    labels = sorted({row.label for row in rows})
    if len(labels) < 2:
        raise SystemExit(f"expected texts of two labels or more to learn from, found {labels}")
    return {label: number for number, label in enumerate(labels)}


def encode(
    rows: list[Sentence], tokenizer: OPTTokenizer, label2id: Mapping[str, int], max_length: int
) -> SentenceRows:
    """Tokens of all texts, cut to `max_length`; a label that was not learnt is refused."""
    for row in rows:
        if row.label not in label2id:
            known = ", ".join(label2id)
            raise SystemExit(f"{row.place}: no text to learn from has {row.label!r}, only {known}")
    encoding = tokenizer(
        [row.text for row in rows],
        padding=True,
        padding_side="right",
        truncation=True,
        max_length=max_length,
        return_tensors="np",
    )
    labels = np.array([label2id[row.label] for row in rows], dtype=np.int64)
    return SentenceRows(encoding["input_ids"], labels)
