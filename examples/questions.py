# SPDX-License-Identifier: Apache-2.0
"""Questions about documents: read or generated, cut into windows, answered by spans, and judged.

A document may be longer than what the model reads at once. It is then cut into windows that overlap, and
the question stands before each of them: the tokens of a causal model see only what is before them.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.json_lines import Line, read_lines
from examples.training import Array
from opt_core import OPTTokenizer
from opt_core.assets.sums import number_to_words

MARKS = ("plus", "minus")
NOT_HERE = (
    0  # the position that stands for both ends where a window lacks the answer: its first `</s>`
)


@dataclass(frozen=True)
class Question:
    """A question, its document, the answers that are right if known, and where the first begins."""

    context: str
    question: str
    answers: tuple[str, ...] = ()
    start: int = 0


@dataclass(frozen=True)
class Windows:
    """Rows `</s> question </s> part of the document`, padded on the right.

    Attributes:
        input_ids: [W, T].
        labels: [W, 2], the first and the last token of the answer, or twice `NOT_HERE`.
        spans: [W, T, 2], the characters of the document that a token stands for; -1 for other tokens.
        questions: [W], the number of the question.
    """

    input_ids: Array
    labels: Array
    spans: Array
    questions: Array


# ---- where questions come from --------------------------------------------------------------------


def generate(count: int, longest: int, seed: int) -> list[Question]:
    """Rows of 3 to `longest` numbers in words; asked is which one stands after "plus", or "minus".

    A document: "seven, forty-two plus nine, thirty minus eleven, two".
    """
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        numbers = [
            number_to_words(int(n))
            for n in random.integers(0, 100, random.integers(3, longest + 1))
        ]
        places = random.permutation(np.arange(1, len(numbers)))[: len(MARKS)]
        marked = dict(zip(places.tolist(), MARKS, strict=True))
        asked = MARKS[random.integers(len(MARKS))]
        context, answer, start = "", "", 0
        for place, number in enumerate(numbers):
            if place in marked:
                context += f" {marked[place]} "
            elif place:
                context += ", "
            if marked.get(place) == asked:
                answer, start = number, len(context)
            context += number
        found.append(Question(context, f"{asked} what?", (answer,), start))
    return found


def read_questions(path: Path) -> list[Question]:
    """Lines {"context", "question", "answers": {"text": [...], "answer_start": [...]}}, as in SQuAD."""
    return [_question(line) for line in read_lines(path)]


def _question(line: Line) -> Question:
    context, question = line.text("context"), line.text("question")
    answers = line.entries.get("answers")
    texts, starts = (
        (answers if isinstance(answers, dict) else {}).get(k) for k in ("text", "answer_start")
    )
    if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts) > 0):
        line.refuse(
            'expected "answers": {"text": [...], "answer_start": [...]} with one answer or more, found '
            + json.dumps(answers)[:80]
        )
    for text, start in zip(texts, starts, strict=True):
        if not (isinstance(text, str) and text.strip() and type(start) is int and start >= 0):
            line.refuse(f"expected an answer and its first character, found {text!r} and {start!r}")
        if not context.startswith(text, start):
            there = context[start : start + len(text)]
            line.refuse(f"expected the answer {text!r} at character {start}, found {there!r}")
    return Question(context, question, tuple(texts), starts[0])


# ---- windows and spans ----------------------------------------------------------------------------


def cut(
    questions: Sequence[Question], tokenizer: OPTTokenizer, max_length: int, stride: int
) -> Windows:
    """Windows of `max_length` tokens, of which neighbours share `stride` tokens of the document."""
    encoding = tokenizer(
        [q.question for q in questions],
        [q.context for q in questions],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        padding="max_length",
        padding_side="right",
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_tensors="np",
    )
    rows = encoding["overflow_to_sample_mapping"]  # [W]
    in_document = np.array([encoding.sequence_ids(w) for w in range(len(rows))]) == 1  # [W, T]
    spans = np.where(in_document[..., None], encoding["offset_mapping"], -1)
    starts = np.array([q.start for q in questions])[rows]
    lengths = np.array([len(q.answers[0]) if q.answers else 0 for q in questions])[rows]
    labels = positions(spans, starts, starts + lengths - 1)
    return Windows(encoding["input_ids"], labels, spans, rows)


def positions(spans: Array, first: Array, last: Array) -> Array:
    """The tokens [W, 2] that the characters `first` and `last` [W] belong to, if both are in the window.

    A character of several bytes may have several tokens: the answer reaches from the first to the last.
    """

    def covers(characters: Array) -> Array:
        characters = characters[:, None]
        return (spans[..., 0] <= characters) & (characters < spans[..., 1])  # [W, T]

    at_first, at_last = covers(first), covers(last)
    is_here = at_first.any(1) & at_last.any(1)
    ends = (at_first.argmax(1), spans.shape[1] - 1 - at_last[:, ::-1].argmax(1))
    return np.where(is_here[:, None], np.stack(ends, -1), NOT_HERE)


def best_answers(
    questions: Sequence[Question],
    windows: Windows,
    start_logits: Array,
    end_logits: Array,
    max_answer_length: int,
) -> list[str]:
    """The likeliest span of up to `max_answer_length` tokens in all windows of each document, as text.

    Likely within its window, where `NOT_HERE` is one of the choices: windows that expect the answer
    elsewhere offer little.
    """
    starts, ends = log_softmax(start_logits), log_softmax(end_logits)  # [W, T] each
    best = [(-np.inf, "")] * len(questions)
    for window, number in enumerate(windows.questions):
        spans = windows.spans[window]
        places = np.flatnonzero(spans[:, 1] >= 0)
        scores = starts[window, places][:, None] + ends[window, places]
        fits = np.triu(np.ones_like(scores)) - np.triu(np.ones_like(scores), max_answer_length)
        scores = np.where(fits == 1, scores, -np.inf)
        first, last = places[list(np.unravel_index(scores.argmax(), scores.shape))]
        if scores.max() > best[number][0]:
            text = questions[number].context[spans[first, 0] : spans[last, 1]].strip()
            best[number] = (scores.max(), text)
    return [text for _, text in best]


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# ---- how good answers are -------------------------------------------------------------------------


def judge(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """The means of exact match and F1, each with the right answer that fits best (arXiv:1606.05250)."""
    pairs = list(zip(answers, questions, strict=True))
    return {
        name: float(
            np.mean([max(measure(given, right) for right in q.answers) for given, q in pairs])
        )
        for name, measure in (("exact_match", exact_match), ("f1", f1))
    }


def words(text: str) -> list[str]:
    """The words that count: in lower case, without punctuation and articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(given: str, right: str) -> float:
    return float(words(given) == words(right))


def f1(given: str, right: str) -> float:
    """The harmonic mean of the shares of words in common; of two answers without words, 1."""
    ours, theirs = words(given), words(right)
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))
