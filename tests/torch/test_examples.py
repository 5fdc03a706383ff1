# SPDX-License-Identifier: Apache-2.0
"""The examples that classify texts and answer questions learn, and go on exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples import answer_questions, classify_text, decoding_strategies
from examples.questions import Question, cut, generate, judge
from examples.training import Log
from opt_core.assets import TINY_SUMS
from opt_torch import (
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTTokenizer,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*initialised anew")

Main = Callable[[list[str]], None]

TOKENIZER = OPTTokenizer.from_pretrained(TINY_SUMS)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def last_values(folder: Path) -> dict[str, float]:
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])


def in_squad_shape(question: Question) -> dict[str, Any]:
    answers = {"text": list(question.answers), "answer_start": [question.start]}
    return {"context": question.context, "question": question.question, "answers": answers}


def test_classification_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of four labels the most frequent has less than half of the texts; none of those was ever seen."""
    texts = ["nine minus forty is", "ninety plus ninety is"]
    classify_text.main(["--output", str(tmp_path), "--steps", "30", "--predict", *texts])
    assert last_values(tmp_path)["accuracy"] > 0.9
    shown = capsys.readouterr().out
    assert "nine minus forty is: negative (" in shown and "ninety plus ninety is: large (" in shown
    saved = OPTForSequenceClassification.from_pretrained(tmp_path)
    assert saved.config.id2label == {0: "large", 1: "medium", 2: "negative", 3: "small"}
    ids = OPTTokenizer.from_pretrained(tmp_path)(texts[0], return_tensors="pt")
    assert saved.config.id2label[int(saved(**ids).logits.argmax())] == "negative"


def test_answering_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A number out of up to 50 is found, also in documents longer than a window, and than the model."""
    document = "one, two plus forty-one, nine minus six, ten"
    answer_questions.main(
        ["--output", str(tmp_path), "--steps", "120", "--predict", "plus what?", document]
    )
    assert last_values(tmp_path)["exact_match"] > 0.85
    assert "plus what? forty-one" in capsys.readouterr().out
    saved = OPTForQuestionAnswering.from_pretrained(tmp_path)
    limit = saved.config.max_position_embeddings
    questions = generate(200, 60, seed=2)
    questions = [q for q in questions if len(TOKENIZER.encode(q.context)) > limit]
    windows = cut(questions, TOKENIZER, 48, 12)
    assert len(questions) > 20 and len(windows.questions) > 3 * len(questions)
    found = answer_questions.answers(saved, questions, windows, 8)
    assert judge(found, questions)["exact_match"] > 0.7


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Log.add

    def stop(log: Log, now: int, **values: float) -> None:
        if now == step:
            raise KeyboardInterrupt
        add(log, now, **values)

    monkeypatch.setattr(Log, "add", stop)


@pytest.mark.parametrize(
    ("main", "rows"),
    [
        (classify_text.main, [{"text": f"{w} plus two", "label": w} for w in ("one", "six")] * 20),
        (answer_questions.main, [in_squad_shape(q) for q in generate(40, 10, seed=0)]),
    ],
    ids=["classification", "questions"],
)
def test_going_on_is_exact(
    main: Main, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped two steps after a state was saved, with dropout, and a file of one's own."""
    model, whole, stopped = (tmp_path / name for name in ("model", "whole", "stopped"))
    OPTForCausalLM.from_pretrained(TINY_SUMS, dropout=0.1).save_pretrained(model)
    TOKENIZER.save_pretrained(model)
    file = write_lines(tmp_path / "rows.jsonl", rows)
    common = ["--model", str(model), "--train-file", str(file), "--eval-file", str(file)]
    common += ["--steps", "7", "--save-every", "3", "--batch-size", "8"]
    main([*common, "--output", str(whole)])
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            main([*common, "--output", str(stopped)])
    assert not (stopped / "model.safetensors").exists()
    main([*common, "--output", str(stopped), "--resume"])
    assert (stopped / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    log = (stopped / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("main", [classify_text.main, answer_questions.main])
def test_help(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--train-file", "--resume", "--predict", "--model"))


def test_labels_that_cannot_be_learnt(tmp_path: Path) -> None:
    """One alone, or one that is only in the file to measure; too few rows for a batch."""
    rows = [{"text": "a", "label": label} for label in ("7", True, 7, "été")]
    names = {"four": rows, "one": rows[:1], "other": [rows[0], {"text": "a", "label": "no"}]}
    for name, chosen in names.items():
        write_lines(tmp_path / name, chosen)

    def main(train: str, *measured: str) -> None:
        files = ["--train-file", str(tmp_path / train)]
        files += ["--eval-file", str(tmp_path / measured[0])] if measured else []
        classify_text.main(["--output", str(tmp_path / "out"), *files])

    with pytest.raises(SystemExit, match=r"two labels or more to learn from, found \['7'\]"):
        main("one", "one")
    with pytest.raises(SystemExit, match="other, line 2: no text to learn from has 'no', only 7,"):
        main("four", "other")
    with pytest.raises(SystemExit, match="--batch-size 32: there are only 3 rows"):
        main("four")  # the first row is held out


def test_the_seed_decides_what_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in "0012":
        decoding_strategies.main(["--strategy=sample", "--strategy=beam-sample", "--seed", seed])
        texts.append(capsys.readouterr().out.replace(f"seed={seed}", ""))
    assert texts[0] == texts[1] and len(set(texts)) > 1
