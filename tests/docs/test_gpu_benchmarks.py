# SPDX-License-Identifier: Apache-2.0
"""The benchmarks on a GPU without a GPU: their rules of comparing, their files, tables and counts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import flash_report, gpu_jobs_report
from benchmarks.gpu_case import EVERYONE, LEFT_OUT, OUT_OF_TIME, Case, Entry, Results, differing
from benchmarks.gpu_race import MOST_CALLS, Budget, Contestant, Request, compete, serve
from benchmarks.gpu_table import (
    FIRST,
    FULL,
    JOBS,
    TINY,
    config_of,
    forward_operations,
    step_bytes,
    tiny,
    training_operations,
)
from docs import make_performance
from opt_core.params import num_parameters

FLASH = "flash_attention_2"


class Clock:
    """A device that takes as long as a contestant says, and knows one excuse."""

    excuses = (MemoryError,)

    def seconds(self, call: Callable[[], Any]) -> float:
        return call()

    def peak(self, call: Callable[[], Any]) -> int:
        return int(call() * 1000)

    def free(self) -> None:
        pass


def contestant(answer: float, seconds: float = 1.0, limit: float = 0.1) -> Contestant:
    return Contestant(lambda: answer, lambda: seconds, limit, lambda: 7)


def fail(error: Exception) -> Contestant:
    raise error


def distance(expected: float, found: float) -> float:
    return abs(found - expected)


def run(
    case: Case, makers: dict[str, Callable[[], Contestant]], seconds: float | None = None
) -> None:
    compete(case, makers, distance, Clock(), 3, Budget(seconds))


def test_who_differs_or_cannot_run_is_not_timed() -> None:
    case = Case("inference", "opt-350m", 2, 512)
    run(
        case,
        {
            "eager": partial(contestant, 1.0, 4.0),
            "sdpa": partial(contestant, 1.05, 2.0),
            "wrong": partial(contestant, 1.2),
            "nan": partial(contestant, math.nan),
            "flash": partial(fail, MemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
            "transformers": partial(fail, ImportError("no\n  such package")),
        },
    )
    assert case.differing == ["wrong", "nan"]
    assert case.absent == {"flash": "out of memory", "transformers": "no such package"}
    assert [name for name in case.entries if case.timed(name)] == ["eager", "sdpa"]
    assert case.entries["sdpa"].seconds == [2.0] * 3
    assert (case.entries["sdpa"].peak, case.entries["sdpa"].attention) == (2000, 7)
    assert case.ratio("sdpa", "eager") == 2.0 and case.ratio("flash", "eager") is None
    assert differing([case]) == [
        f"{name} in inference, opt-350m, 2 x 512" for name in ("wrong", "nan")
    ]


def test_a_mistake_of_ours_is_no_excuse() -> None:
    with pytest.raises(ImportError):
        run(Case("decode", "tiny", 1, 8), {"ours": partial(fail, ImportError("torchao"))})


def test_memory_that_ends_in_a_round_ends_a_contestant() -> None:
    calls = []

    def once_too_often() -> float:
        calls.append(1)
        if len(calls) > 4:
            raise MemoryError("out of memory")
        return 1.0

    case = Case("decode", "tiny", 1, 8)
    late = Contestant(lambda: 1.0, once_too_often, 0.1)
    run(case, {"ours": partial(contestant, 1.0), "late": lambda: late})
    assert [*case.entries] == ["ours"] and case.absent == {"late": "out of memory"}


def test_short_calls_are_repeated() -> None:
    calls = []
    quick = Contestant(lambda: 1.0, lambda: calls.append(1) or 1e-4, 0.1)
    case = Case("decode", "tiny", 1, 8)
    run(case, {"ours": lambda: quick})
    assert len(calls) == 3 + 3 * MOST_CALLS
    assert case.entries["ours"].seconds == pytest.approx([1e-4] * 3)


class Watch(Clock):
    """The clock of all of them: contestants take as long as they say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("benchmarks.gpu_race.time.monotonic", lambda: self.now)

    def seconds(self, call: Callable[[], Any]) -> float:
        self.now += call()
        return call()


def test_when_the_time_is_over_nobody_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before counts."""
    everyone = {name: partial(contestant, 1.0, 1.0) for name in ("eager", "sdpa")}
    for seconds, rounds in ((3.5, 0), (5.5, 1), (6.5, 2), (1000, 3)):
        case, watch = Case("inference", "opt-350m", 2, 512), Watch(monkeypatch)
        compete(case, everyone, distance, watch, 3, Budget(seconds))
        assert len(case.entries["eager"].seconds) == rounds if rounds else not case.entries
        assert case.absent == ({} if rounds else dict.fromkeys(everyone, OUT_OF_TIME))
    case = Case("inference", "opt-350m", 2, 512)
    compete(case, everyone, distance, Watch(monkeypatch), 3, Budget(4.5))
    assert [*case.entries] == ["eager"] and case.absent == {"sdpa": OUT_OF_TIME}
    case = Case("inference", "opt-350m", 2, 512, absent={"other": LEFT_OUT})
    run(case, everyone, 0.0)
    assert case.absent == {"other": LEFT_OUT, **dict.fromkeys(everyone, OUT_OF_TIME)}


def test_a_worker_tells_each_case_and_skips_what_does_not_fit(monkeypatch, capsys) -> None:
    watch = Watch(monkeypatch)
    cases = [Case("decode", "opt-125m", 1, length) for length in (1, 2, 3)]
    request = Request(cases, ("slow", "unknown"), 1, 5.0, 7.0, "cpu")
    everyone = {"ours": partial(contestant, 1.0), "slow": partial(fail, AssertionError("made"))}
    serve(Request.read(str(request)), lambda case: (everyone, distance), watch)
    lines = capsys.readouterr().out.splitlines()
    found = [Case.from_json(json.loads(line)) for line in lines]
    assert [case.key for case in found] == [case.key for case in cases]
    assert found[0].timed("ours") and found[0].absent == {"slow": LEFT_OUT}
    assert [case.absent for case in found[1:]] == [{EVERYONE: OUT_OF_TIME}] * 2
    assert found[1].lacks(OUT_OF_TIME) and not found[0].lacks(OUT_OF_TIME)


def test_the_first_minutes_are_a_part_of_everything() -> None:
    keys = [[case.key for part in plan for case in part.cases()] for plan in (FIRST, FULL)]
    assert len(set(keys[0])) == len(keys[0]) and len(set(keys[1])) == len(keys[1])
    assert {*keys[0]} < {*keys[1]}
    assert not any(part.without for part in FULL)
    assert {part.section for part in FIRST} == JOBS.keys()
    shown = {(c.size, c.length) for part in FIRST[:2] for c in part.cases() if not c.padded}
    assert shown == {(size, n) for size in ("opt-350m", "opt-2.7b") for n in (512, 2048)}


def test_a_trial_has_each_part_once() -> None:
    for plan in (FIRST, FULL):
        cases = [case for part in tiny(plan) for case in part.cases()]
        assert len({case.key for case in cases}) == len(cases)
        assert {case.size for case in cases} == {TINY}
        limit = config_of(TINY).max_position_embeddings
        assert all(case.length + JOBS[case.section].new // 10 < limit for case in cases)


ENVIRONMENT = {
    "processor": "a processor",
    "system": "Linux",
    "python": "3.12",
    "card": "a card",
    "card_memory": 80 * 2**30,
    "cuda": "13.0",
    "versions": {"torch": "2.11"},
}


def test_runs_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "figures.json"
    results = Results.opened(path, ENVIRONMENT)
    results.tests = {"torch": {"passed": 3}}
    results.card = {"copy": 1.0}
    results.add(Case("decode", "tiny", 1, 8, entries={"ours": Entry(0.0, seconds=[1.0])}))
    results.add(Case("decode", "tiny", 1, 8, framework="flax"))
    results.write(path)
    later = Results.opened(path, {**ENVIRONMENT, "processor": "another"})
    assert later == results
    later.add(Case("decode", "tiny", 1, 8, absent={"ours": "out of memory"}))
    assert [case.framework for case in later.cases] == ["flax", "torch"]


def test_figures_of_another_machine_are_moved_away(tmp_path: Path, capsys) -> None:
    """Never lost, and no reason not to begin."""
    path = tmp_path / "gpu.json"
    for number, change in enumerate(({"versions": {"torch": "2.12"}}, {"card": "another"}), 1):
        Results(ENVIRONMENT, {"copy": float(number)}).write(path)
        results = Results.opened(path, {**ENVIRONMENT, **change})
        assert results == Results({**ENVIRONMENT, **change}) and not path.exists()
        assert Results.read(tmp_path / f"gpu.{number}.json").card == {"copy": number}
        assert f"now {tmp_path}/gpu.{number}.json" in capsys.readouterr().err


def test_who_is_killed_while_writing_leaves_the_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "figures.json"
    Results(ENVIRONMENT, cases=[Case("decode", "tiny", 1, 8)]).write(path)

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Results(ENVIRONMENT).write(path)
    assert len(Results.read(path).cases) == 1


def entry(seconds: float, attention: int = 0) -> Entry:
    return Entry(0.001, seconds=[seconds] * 3, peak=attention * 2, attention=attention)


def flash_case(size: str, batch: int, **changes: Any) -> Case:
    entries = {
        "eager": entry(0.4, 8 * 10**9),
        "sdpa": entry(0.2, 10**9),
        FLASH: entry(0.1, 10**9),
        f"transformers {FLASH}": entry(0.09, 10**9),
    }
    return Case("inference", size, batch, 2048, entries=entries, **changes)


def test_the_table_of_speed_ups_knows_its_targets() -> None:
    short = flash_case("opt-2.7b", 16, padded=True)
    del short.entries["eager"]
    short.absent["eager"] = "out of memory"
    text = flash_report.report([short, flash_case("opt-2.7b", 1), flash_case("opt-350m", 1)])
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| opt")]
    assert [row[0] for row in rows] == ["| opt-2.7b", "| opt-2.7b", "| opt-350m"]
    assert rows[0][3:11] == [
        "none",
        "400.0 ms",
        "2.00",
        "4.00 of 2.5",
        "8.00 of 3",
        "16.00 GB",
        "2.00 GB",
        "0.90 of 1, missed",
    ]
    assert rows[1][3:10] == ["left", "-", "-", "-", "-", "-", "2.00 GB"]
    assert rows[2][6:8] == ["4.00", "8.00"]  # nothing is aimed at
    assert text.endswith("- PyTorch, eager, opt-2.7b 16 x 2048: out of memory\n")


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "picture.svg"
    flash_report.write_plot([flash_case("opt-2.7b", 2), flash_case("opt-350m", 1)], path)
    assert "opt-350m, 2048 tokens" in path.read_text()


def test_a_picture_may_wait(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flash_report.write_plot([flash_case("opt-2.7b", 2)], tmp_path / "picture.png")
    assert "matplotlib is missing" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def decoding() -> Results:
    """opt-2.7b on a card that reads as many bytes in a second as opt-2.7b has, ten times over."""
    plain = step_bytes(config_of("opt-2.7b"), 2.0)
    card = {"copy": 10 * plain, "read": plain, "product": 1e15, "bytes": 2**30, "side": 8192}
    torch = {"ours": entry(64 / 5), "ours static": entry(64 / 9), "ours int8": entry(64 / 12)}
    torch["transformers"] = entry(64 / 3)
    cases = [
        Case("decode", "opt-2.7b", 1, 32, framework="flax", entries={"ours": entry(64 / 7)}),
        Case("decode", "opt-2.7b", 1, 32, entries=torch, absent={"ours int4": "no kernel"}),
    ]
    return Results(ENVIRONMENT, card, cases)


def test_the_table_of_decoding_names_shares_and_ratios() -> None:
    results = decoding()
    text = gpu_jobs_report.report(results, results.cases)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "opt-2.7b |" in line]
    found = {(row[2], row[3]): row[5:10] for row in rows}
    assert next(iter(found)) == ("PyTorch", "ours")
    assert found["PyTorch", "ours"] == ["5", "0.50", "1.67", "-", "-"]
    assert found["PyTorch", "ours static"] == ["9", "0.90 of 0.8", "3.00", "-", "-"]
    assert found["PyTorch", "ours int8"][1] == "0.60"
    assert found["PyTorch", "transformers"][2] == "-"
    assert found["JAX/Flax", "ours"] == ["7", "0.70", "-", "-", "0.78 of 0.77"]
    assert text.endswith("- PyTorch, ours int4, everywhere: no kernel\n")


def test_what_a_step_must_do() -> None:
    """The numbers of PaLM's count, but for half of attention: a query sees half of the keys."""
    config = config_of("opt-1.3b")
    positions = 2050 * 2048
    assert step_bytes(config, 2.0) == 2 * (num_parameters(config) - positions)
    assert step_bytes(config, 0.5) < step_bytes(config, 1.0) < step_bytes(config, 2.0)
    layer, head = 4 * 2048**2 + 2 * 2048 * 8192, 50272 * 2048
    weights = 24 * layer
    attention = 2 * 24 * 2048 * 2048**2
    assert forward_operations(config, 1, 2048, head=False) == 2 * weights * 2048 + attention
    step = training_operations(config, 8, 2048)
    assert step == 8 * 2048 * (6 * (weights + head) + 12 * 24 * 2048 * 2048 / 2)


def test_the_page_has_what_was_measured(tmp_path: Path, monkeypatch) -> None:
    """Of a run that was cut, too."""
    monkeypatch.setattr(make_performance, "ROOT", tmp_path)
    folder = tmp_path / "benchmarks" / "gpu"
    assert make_performance.gpu(folder) == {}
    results = decoding()
    results.tests = {"torch": {"passed": 9, "failed": 0, "skipped": 1, "seconds": 8.2, "cut": True}}
    results.write(folder / "gpu.json")
    text = make_performance.gpu(folder)["gpu"]
    assert "### On a GPU: decoding, batch 1, bfloat16\n\n| size |" in text
    assert "FlashAttention in" not in text
    assert "9 tests passed, 0 failed, 1 skipped in 8 s, then the time was over.\n" in text
    assert "- a card, 80 GiB, CUDA 13.0; a processor, Linux, Python 3.12.\n" in text
    late = Case("inference", "opt-2.7b", 4, 2048, absent={EVERYONE: OUT_OF_TIME})
    for case in (flash_case("opt-2.7b", 1), late):
        results.add(case)
    results.write(folder / "gpu.json")
    (folder / "flash_attention.png").touch()
    text = make_performance.gpu(folder)["gpu"]
    assert "](../benchmarks/gpu/flash_attention.png)\n\n| size |" in text
    assert "- PyTorch, everyone, opt-2.7b 4 x 2048: not measured: out of time\n" in text
    assert "FlashAttention is PyTorch's own kernels" in text and text.endswith("\n")


def test_the_page_has_no_trial(tmp_path: Path) -> None:
    results = decoding()
    results.environment = {key: ENVIRONMENT[key] for key in ENVIRONMENT if key != "cuda"}
    results.write(tmp_path / "gpu.json")
    assert make_performance.gpu(tmp_path) == {}
