# SPDX-License-Identifier: Apache-2.0
"""The drivers of `benchmarks/decode.py` and `benchmarks/train.py` with workers that have no model."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from benchmarks import contest, train_report
from benchmarks.contest import LostError, Pool, Program, Worker, agreement, race, ratio
from benchmarks.decode_race import run_job
from benchmarks.decode_report import report
from benchmarks.train import run_column
from benchmarks.train_table import COLUMNS, Column

#: A contestant that counts on from a prompt's last token; "late" is wrong from its third token on.
COUNTING = """
import sys
sys.path.insert(0, {serving!r})
import numpy as np
from serving import Decoder, serve

class Counting(Decoder):
    modules = ("numpy",)

    def __init__(self, checkpoint, kind="right"):
        if kind == "broken":
            raise SystemExit("no such model")
        self.kind = kind

    def generate(self, prompts, new_tokens):
        wrong = 3 if self.kind == "late" else new_tokens
        return [
            [p[-1] % 50 + 1 + i + (i >= wrong) for i in range(new_tokens)] for p in prompts
        ]

    def logits(self, prompts, new_tokens):
        tokens = np.array(self.generate(prompts, new_tokens)).T
        return np.eye(200)[tokens]

serve(Counting)
"""
#: One that trains: its loss is the mean token, off by a factor, and larger with dropout.
LEARNING = """
import sys
sys.path.insert(0, {serving!r})
import numpy as np
from serving import Trainer, serve

class Learning(Trainer):
    modules = ("numpy",)

    def __init__(self, checkpoint, factor, dropout):
        self.factor, self.dropout = float(factor), float(dropout)

    def train(self, batches):
        return float(np.mean(batches)) * self.factor * (1 + self.dropout)

serve(Learning)
"""


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    serving = str(contest.WORKERS)
    (tmp_path / "counting.py").write_text(COUNTING.format(serving=serving))
    (tmp_path / "learning.py").write_text(LEARNING.format(serving=serving))
    monkeypatch.setattr(contest, "WORKERS", tmp_path)
    return tmp_path


def program(kind: str) -> Program:
    return Program("counting", (kind,), sizes=("opt-125m",))


def test_a_race_compares_tokens_before_times(workers: Path) -> None:
    """Who is wrong is not timed, who cannot start is named, and the rest has its rounds."""
    programs = {
        "ours": program("right"),
        "ours prepared": program("right"),
        "transformers": program("late"),
        "CTranslate2": program("broken"),
        "bandwidth": program("right"),
    }
    checkpoint = workers / "opt-125m"
    with ExitStack() as stack:
        found = run_job(Pool(checkpoint, programs, workers, stack), "torch", "decode-1", 2)
    assert found.differing == ["transformers"]
    assert found.entries["transformers"].same == 3
    assert found.entries["transformers"].margin == 1
    assert found.entries["transformers"].seconds == []
    assert len(found.entries["ours"].seconds) == 2
    assert found.absent == {"CTranslate2": "no such model"}
    text = report([found])
    assert "TOKENS DIFFER: transformers" in text and "3 of 64, margin 1e+00" in text


def train(workers: Path, monkeypatch: pytest.MonkeyPatch, **factors: str) -> train_report.Race:
    """A race of two rounds; names in `factors` have _ for a space."""
    programs = {
        name.replace("_", " "): Program("learning", (factor,), exact="rounded" not in name)
        for name, factor in factors.items()
    }
    column = Column("Fake", programs, {"ours": 1e9, "ours rounded": 1e-9})
    monkeypatch.setitem(COLUMNS, "fake", column)
    return run_column("fake", workers / "opt-125m", workers, 2)


def test_training_compares_losses_before_times(
    workers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who computes something else is not timed; who rounds may differ more; errors are stated."""
    factors = {"ours": "1.00001", "ours_other": "1.001", "ours_rounded": "1.001"}
    factors |= {"ours_rounded_much": "nan", "transformers": "1", "transformers_graph": "one"}
    found = train(workers, monkeypatch, **factors)
    assert found.differing == ["ours other", "ours rounded much"]
    timed = [name for name, entry in found.entries.items() if entry.seconds]
    assert timed == ["ours", "ours rounded", "transformers"]
    assert all(len(found.entries[name].seconds) == 2 for name in timed)
    assert all(found.entries[name].peak > 1e6 for name in timed)
    assert found.entries["ours"].error == pytest.approx(1e-5)
    assert found.absent == {
        "transformers graph": "ValueError: could not convert string to float: 'one'"
    }
    text = train_report.report(found)
    assert "LOSSES DIFFER: ours other" in text and "LOSSES DIFFER: ours rounded much" in text
    assert " of 1e+09, missed | " in text and " of 1e-09 | " in text


def test_training_without_a_peer_has_no_ratio(
    workers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = train(workers, monkeypatch, ours="1", transformers="one")
    assert found.differing == [] and found.to_peer("ours") is None
    assert found.entries["ours"].error is None and len(found.entries["ours"].seconds) == 2


def test_a_worker_that_ends_is_lost(workers: Path) -> None:
    command = [sys.executable, str(workers / "counting.py"), "-"]
    with Worker(command, {}, workers / "log") as worker:
        assert worker.ask("generate", prompts=[[5]], new_tokens=2)["result"] == [[6, 7]]
        with pytest.raises(LostError, match="TypeError"):
            worker.ask("generate", prompts=[[5]])


def test_rounds_alternate(workers: Path) -> None:
    with ExitStack() as stack:
        command = [sys.executable, str(workers / "counting.py"), "-"]
        two = {n: stack.enter_context(Worker(command, {}, workers / n)) for n in "ab"}
        seconds = race(two, 3, two.values(), "generate", prompts=[[5]], new_tokens=2)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_median_of_rounds() -> None:
    assert ratio([1.0, 2.0, 1.0], [2.0, 2.0, 9.0]) == 2


def test_a_near_tie_is_no_difference() -> None:
    logits = np.zeros((2, 1, 4))
    logits[:, 0, 1], logits[:, 0, 2] = 1.0, 1.0 - 1e-6
    near = agreement([[1, 1]], [[1, 2]], lambda: logits)
    assert (near.same, near.tokens, near.is_exact) == (1, 2, True)
    assert not agreement([[1, 1]], [[1, 3]], lambda: logits).is_exact
