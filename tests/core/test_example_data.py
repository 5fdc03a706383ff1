# SPDX-License-Identifier: Apache-2.0
"""What the examples read, cut into windows, find and measure: files that are wrong, spans, odd characters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.json_lines import train_and_held_out
from examples.questions import (
    Question,
    Windows,
    best_answers,
    cut,
    f1,
    generate,
    judge,
    positions,
    read_questions,
)
from examples.sentences import read_sentences
from opt_core import OPTTokenizer
from opt_core.assets import TINY_SUMS

TOKENIZER = OPTTokenizer.from_pretrained(TINY_SUMS)
SQUAD = {"context": "nine plus ten", "question": "what?"}


# ---- bad files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "line", "message"),
    [
        (read_sentences, "{", "line 2: expected a line of JSON"),
        (read_sentences, "[" * 100_000, "line 2: expected a line of JSON"),
        (read_sentences, b'{"text": "\xff"}', "line 2: expected a line of JSON"),
        (read_sentences, "[1]", "line 2: expected an object {...}, found list"),
        (read_sentences, {"label": "a"}, 'line 2: expected "text" with a text, found null'),
        (read_sentences, {"text": " ", "label": "a"}, 'line 2: expected "text"'),
        (read_sentences, {"text": "\ud800", "label": "a"}, "half of a surrogate pair"),
        (read_sentences, {"text": "one", "label": 0.5}, '"label" with a text, found 0.5'),
        (read_questions, SQUAD, 'line 2: expected "answers"'),
        (
            read_questions,
            SQUAD | {"answers": {"text": [], "answer_start": []}},
            "one answer or more",
        ),
        (read_questions, SQUAD | {"answers": {"text": ["ten"], "answer_start": []}}, "one answer"),
        (
            read_questions,
            SQUAD | {"answers": {"text": ["ten"], "answer_start": [True]}},
            "line 2: expected an answer and its first character, found 'ten' and True",
        ),
        (
            read_questions,
            SQUAD | {"answers": {"text": ["nine", "ten"], "answer_start": [0, 9]}},
            "line 2: expected the answer 'ten' at character 9, found ' te'",
        ),
        (
            read_questions,
            SQUAD | {"answers": {"text": ["ten"], "answer_start": [-3]}},
            "first character, found 'ten' and -3",
        ),
    ],
)
def test_bad_lines(read: Callable[[Path], Any], line: Any, message: str, tmp_path: Path) -> None:
    """The second line is bad; the first, empty one is passed over."""
    file = tmp_path / "rows.jsonl"
    text = json.dumps(line) if isinstance(line, dict) else line
    file.write_bytes(b"\n" + (text if isinstance(text, bytes) else text.encode()))
    with pytest.raises(SystemExit) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file}, line 2: ") and message in str(caught.value)


@pytest.mark.parametrize("read", [read_sentences, read_questions])
def test_files_without_lines(read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"\n \n")
    with pytest.raises(SystemExit, match="empty: expected JSON lines, found none"):
        read(tmp_path / "empty")
    with pytest.raises(SystemExit, match="missing: No such file"):
        read(tmp_path / "missing")


def test_labels_are_texts_numbers_and_truth_values(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a", "label": label}) for label in (True, 7, "été", "7")]
    (tmp_path / "rows").write_text("\n".join(lines))
    assert [row.label for row in read_sentences(tmp_path / "rows")] == ["true", "7", "été", "7"]


def test_what_is_held_out(tmp_path: Path) -> None:
    """One row of ten, or another file; one row is not enough for both."""
    lines = [json.dumps({"text": str(number), "label": "a"}) for number in range(25)]
    names = {"many": lines, "one": lines[:1]}
    for name, chosen in names.items():
        (tmp_path / name).write_text("\n".join(chosen))
    train, held_out = train_and_held_out(read_sentences, tmp_path / "many", None)
    assert [row.text for row in held_out] == ["0", "10", "20"] and len(train) == 22
    assert not {row.text for row in train} & {row.text for row in held_out}
    train, held_out = train_and_held_out(read_sentences, tmp_path / "one", tmp_path / "many")
    assert (len(train), len(held_out)) == (1, 25)
    with pytest.raises(SystemExit, match="one: has one row"):
        train_and_held_out(read_sentences, tmp_path / "one", None)


# ---- windows, spans, measures ---------------------------------------------------------------------


def test_windows_hold_the_answer_or_stand_for_none() -> None:
    """Each has the question first; an answer that is cut by the window's edge is not in it."""
    questions = generate(50, 50, seed=3)
    windows = cut(questions, TOKENIZER, 24, 6)
    held = set()
    for ids, (first, last), spans, number in zip(
        windows.input_ids, windows.labels, windows.spans, windows.questions, strict=True
    ):
        question = questions[number]
        assert TOKENIZER.decode(ids).startswith(f"</s>{question.question}</s>")
        start, end = question.start, question.start + len(question.answers[0])
        inside = spans[spans[:, 1] >= 0]
        if inside[0, 0] <= start and end <= inside[-1, 1]:
            held.add(number)
            assert question.context[spans[first, 0] : spans[last, 1]].strip() == question.answers[0]
        else:
            assert (first, last) == (0, 0)
    assert held == set(range(50)) and len(windows.labels) > 150
    assert (windows.labels == 0).all(1).any()


def test_positions_of_an_answer_that_a_window_cuts() -> None:
    """Three windows of "ab cd ef": whole, without the answer's end, without its beginning."""
    spans = np.array(
        [
            [[-1, -1], [0, 2], [2, 5], [5, 8]],
            [[-1, -1], [0, 2], [2, 5], [-1, -1]],
            [[-1, -1], [5, 8], [-1, -1], [-1, -1]],
        ]
    )
    first, last = np.array([3, 3, 3]), np.array([7, 7, 7])
    assert positions(spans, first, last).tolist() == [[2, 3], [0, 0], [0, 0]]


@pytest.mark.parametrize("answer", ["naïve", "日本", "🙂", "🙂🙂 é"])
def test_characters_of_several_bytes(answer: str) -> None:
    """They have several tokens each here; the span that is learnt gives the answer back."""
    context = f"één, ß {answer} — zwölf"
    question = Question(context, "¿qué?", (answer,), context.index(answer))
    windows = cut([question], TOKENIZER, 100, 10)
    logits = np.eye(100)[windows.labels[0]] * 9  # [2, T]
    found = best_answers([question], windows, logits[:1], logits[1:], 50)
    assert found == [answer]


def span_windows(count: int) -> tuple[list[Question], Windows]:
    """`count` windows of 5 tokens of one document, of which the last is a pad: "ab cd ef" at first."""
    spans = np.array([[[-1, -1], [0, 2], [2, 5], [5, 8], [-1, -1]]] * count)
    spans[1:, 1:4] += 10
    empty = np.zeros((count, 5), np.int64)
    question = Question("ab cd ef, gh ij kl", "?")
    return [question], Windows(empty, empty[:, :2], spans, np.zeros(count, np.int64))


@pytest.mark.parametrize(
    ("start", "end", "longest", "answer"),
    [
        ([0, 9, 0, 0, 0], [0, 0, 0, 9, 0], 3, "ab cd ef"),
        ([0, 9, 0, 5, 0], [0, 0, 1, 9, 0], 2, "ef"),  # the three are too long
        ([0, 0, 0, 9, 0], [0, 9, 0, 5, 0], 3, "ef"),  # no end before the start
        ([9, 2, 0, 0, 0], [9, 0, 1, 0, 9], 3, "ab cd"),  # neither </s> nor pads
    ],
)
def test_spans(start: list[float], end: list[float], longest: int, answer: str) -> None:
    questions, windows = span_windows(1)
    found = best_answers(questions, windows, np.array([start]), np.array([end]), longest)
    assert found == [answer]


def test_the_best_of_all_windows() -> None:
    """The first has the higher logits, but expects the answer elsewhere."""
    questions, windows = span_windows(2)
    start = np.array([[30.0, 20, 0, 0, 0], [0, 0, 5, 0, 0]])
    assert best_answers(questions, windows, start, start, 3) == ["ij"]
    start[0, 0] = 0
    assert best_answers(questions, windows, start, start, 3) == ["ab"]


def test_measures() -> None:
    """Case, punctuation and articles do not count; of several right answers the best counts."""
    questions = [Question("", "", ("The cat's hat!", "a hat")), Question("", "", ("forty-two",))]
    assert judge(["cats HAT", "42"], questions) == {"exact_match": 0.5, "f1": 0.5}
    assert f1("the red hat", "hat") == pytest.approx(2 / 3)
    assert f1("hat hat", "hat") == pytest.approx(2 / 3)
    assert (f1("", "hat"), f1("the", "an")) == (0, 1)
