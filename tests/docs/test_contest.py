# SPDX-License-Identifier: Apache-2.0
"""The driver of `benchmarks/decode.py` with workers that have no model."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from benchmarks import decode_race
from benchmarks.contest import LostError, Worker, agreement, race, ratio
from benchmarks.decode_race import Pool, run_job
from benchmarks.decode_report import report
from benchmarks.decode_table import Program

#: A contestant that counts on from a prompt's last token; "late" is wrong from its third token on.
COUNTING = """
import sys
sys.path.insert(0, {serving!r})
import numpy as np
from serving import Contestant, serve

class Counting(Contestant):
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


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    serving = str(decode_race.WORKERS)
    (tmp_path / "counting.py").write_text(COUNTING.format(serving=serving))
    monkeypatch.setattr(decode_race, "WORKERS", tmp_path)
    monkeypatch.setattr(decode_race, "BANDWIDTH", Program("counting"))
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
        seconds = race(two, 3, two.values(), prompts=[[5]], new_tokens=2)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_median_of_rounds() -> None:
    assert ratio([1.0, 2.0, 1.0], [2.0, 2.0, 9.0]) == 2


def test_a_near_tie_is_no_difference() -> None:
    logits = np.zeros((2, 1, 4))
    logits[:, 0, 1], logits[:, 0, 2] = 1.0, 1.0 - 1e-6
    near = agreement([[1, 1]], [[1, 2]], lambda: logits)
    assert (near.same, near.tokens, near.is_exact) == (1, 2, True)
    assert not agreement([[1, 1]], [[1, 3]], lambda: logits).is_exact
