# SPDX-License-Identifier: Apache-2.0
"""The benchmarks on a GPU, tried on the CPU with a small model; transformers is absent, or a fake."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_case import EVERYONE, FAILED, LEFT_OUT, OUT_OF_TIME, Case, Entry, Results
from benchmarks.gpu_device import TorchDevice
from benchmarks.gpu_jobs import Batch, Decoded, decoded_distance, largest_relative, models_of
from benchmarks.gpu_models import ours, random_tokens, random_weights
from benchmarks.gpu_race import Budget, Request
from benchmarks.gpu_table import FIRST, FULL, TINY_CONFIG, Part, tiny
from benchmarks.workers import gpu_torch
from opt_core import OPTConfig
from opt_torch import OPTForCausalLM

CPU = torch.device("cpu")
TRIAL = ["--device", "cpu", "--tiny", "--rounds", "1"]
FLASH = "flash_attention_2"


@pytest.fixture(autouse=True)
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.fixture
def fake_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours under their names, but for "sdpa", which is another model."""

    def from_config(config: OPTConfig, attn_implementation: str, dtype: torch.dtype) -> Any:
        if attn_implementation == "sdpa":
            config = config.replace(activation_function="gelu")
        model = OPTForCausalLM(config, attn_implementation=attn_implementation)
        model.generation_config = SimpleNamespace()
        return model

    package = ModuleType("transformers")
    package.OPTConfig = lambda **fields: OPTConfig.from_dict(fields)
    package.OPTForCausalLM = SimpleNamespace(_from_config=from_config)
    monkeypatch.setitem(sys.modules, "transformers", package)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as the benchmark will; this takes it back


def served(monkeypatch, capsys, *cases: Case, without: tuple[str, ...] = ()) -> list[Case]:
    """What a worker tells, here run in this process."""
    models_of.cache_clear()
    request = Request([*cases], without, 1, 0.0, None, "cpu")
    monkeypatch.setattr(sys, "argv", ["gpu_torch.py", str(request)])
    gpu_torch.main()
    lines = capsys.readouterr().out.splitlines()
    return [Case.from_json(json.loads(line)) for line in lines if line.startswith("{")]


def test_inference_without_a_gpu(monkeypatch, capsys) -> None:
    asked = [Case("inference", "tiny", 3, 16, padded) for padded in (False, True)]
    cases = served(monkeypatch, capsys, *asked, without=("transformers eager",))
    assert [case.key for case in cases] == [case.key for case in asked]
    for case in cases:
        assert [*case.entries] == ["eager", "sdpa"] and not case.differing
        assert 0 < case.entries["sdpa"].error < 1e-2
        assert case.timed("sdpa") and case.entries["sdpa"].peak is None
        assert "expected a CUDA device, found cpu" in case.absent[FLASH]
        assert "transformers" in case.absent["transformers sdpa"]
        assert case.absent["transformers eager"] == LEFT_OUT
    assert "| tiny | 16 | 3 | left |" in gpu.report(Results({}), cases)


def test_a_peer_that_computes_something_else_is_not_timed(
    monkeypatch, capsys, fake_transformers: None
) -> None:
    (case,) = served(monkeypatch, capsys, Case("inference", "tiny", 1, 16))
    assert case.differing == ["transformers sdpa"]
    assert case.timed("transformers eager") and not case.timed("transformers sdpa")
    assert case.entries["transformers eager"].error == 0


def test_decoding_prefill_and_training_without_a_gpu(monkeypatch, capsys) -> None:
    parts = [part for part in tiny(FULL) if part.framework == "torch"]
    asked = [case for part in parts for case in part.cases() if case.section != "inference"]
    cases = served(monkeypatch, capsys, *asked)
    found = {(case.section, case.length): case for case in cases}
    assert [*found] == [("decode", 8), ("prefill", 16), ("prefill", 31), ("training", 32)]
    decode = found["decode", 8]
    for name in ("ours", "ours static", "ours int8"):
        assert decode.timed(name), decode.absent
    assert decode.entries["ours static"].error == 0 < decode.entries["ours int8"].error
    for key in [key for key in found if key[0] != "decode"]:
        assert found[key].timed("ours")
        assert "expected a CUDA device" in found[key].absent["ours flash"]
    assert "to transformers static" in gpu.report(Results({}), [decode])


def test_half_of_the_rows_are_padded() -> None:
    batch = Batch.random(TINY_CONFIG, 3, 16, True, CPU)
    assert batch.mask.sum(1).tolist() == [12, 12, 16]
    assert ((batch.ids == 1) == (batch.mask == 0)).all()
    assert batch.mask[0, :4].sum() == 0
    assert Batch.random(TINY_CONFIG, 3, 16, False, CPU).mask is None


def test_a_run_from_the_tests_to_the_last_case(tmp_path: Path, capfd) -> None:
    """With processes of its own; figures of another part come into the same file."""
    arguments = [*TRIAL, "--results", str(tmp_path), "--framework", "torch", "--budget", "500"]
    sections = ("tests", "card", "training")
    assert gpu.main([*arguments, *(x for name in sections for x in ("--section", name))]) == 0
    results = Results.read(tmp_path / "gpu.json")
    counts = results.tests["torch"]
    assert counts["skipped"] > 50 and not (counts["passed"] or counts["failed"] or counts["cut"])
    assert "there is no CUDA GPU" in (tmp_path / "test_torch.txt").read_text()
    assert results.card.keys() == {"copy", "read", "product", "bytes", "side"}
    assert [(case.section, case.size) for case in results.cases] == [("training", "tiny")]
    assert results.cases[0].timed("ours")
    out = capfd.readouterr().out
    assert "of products" in out and "Agreement, PyTorch: 0 tests passed" in out


def test_a_card_of_which_no_test_has_passed(tmp_path: Path, monkeypatch) -> None:
    """All skipped is no agreement."""
    run = run_of(tmp_path, monkeypatch)
    counts = {"passed": 0, "failed": 0, "skipped": 9, "seconds": 1.0, "cut": False}
    found = SimpleNamespace(finish=lambda seconds: counts)
    monkeypatch.setattr(gpu, "Tests", lambda *_: found)
    assert run.tests()
    monkeypatch.setattr(TorchDevice, "is_cuda", True)
    assert not run.tests()
    counts["cut"] = True
    assert run.tests()
    counts["failed"] = 1
    assert not run.tests()


def test_resuming_runs_the_tests_that_are_missing(tmp_path: Path, monkeypatch) -> None:
    run, begun = run_of(tmp_path, monkeypatch, "--resume"), []
    good = {"passed": 9, "failed": 0, "skipped": 0, "seconds": 1.0, "cut": False, "full": False}
    monkeypatch.setattr(
        gpu,
        "Tests",
        lambda name, *_: begun.append(name) or SimpleNamespace(finish=lambda seconds: good),
    )
    for earlier, full, expected in (
        ({}, False, ["torch", "flax"]),
        ({"torch": good}, False, ["flax"]),
        ({"torch": good, "flax": {**good, "cut": True}}, False, ["flax"]),
        ({"torch": {**good, "failed": 1}, "flax": good}, False, ["torch"]),
        ({"torch": good, "flax": {**good, "full": True}}, True, ["torch"]),
    ):
        begun.clear()
        run.results.tests, run.options.full = dict(earlier), full
        assert run.tests() and begun == expected


TESTED = """
import time, pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
@pytest.mark.parametrize("where", ["a row of pads"])
def test_bad(where): assert False
@pytest.mark.skip(reason="no")
def test_skipped(): pass
@pytest.mark.full
def test_rest(): pass
def test_long(): time.sleep({})
"""


@pytest.mark.parametrize(
    ("full", "sleep", "expected"),
    [(False, 0, (2, 1, 1, False)), (True, 0, (3, 1, 1, False)), (False, 60, (1, 1, 1, True))],
    ids=["first", "full", "cut"],
)
def test_tests_are_counted(tmp_path: Path, monkeypatch, full, sleep, expected) -> None:
    """Also those before the time was over."""
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "test_torch.py").write_text(TESTED.format(sleep))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: .\n    full: .\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    tests = gpu.Tests("torch", tmp_path, full, "cpu")
    while sleep and "test_long" not in tests.log.read_text():
        time.sleep(0.05)
    found = tests.finish(0.1 if sleep else 60)
    assert tuple(found[key] for key in ("passed", "failed", "skipped", "cut")) == expected


def test_a_process_that_crashes_is_a_failure(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "test_torch.py").write_text("import os; os._exit(3)")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.Tests("torch", tmp_path, True, "cpu").finish(60)["failed"] == 1


def run_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, left: float = 100
) -> gpu.Run:
    options = gpu.parse([*TRIAL, "--results", str(folder), "--budget", "100", *arguments])
    return gpu.Run(options, TorchDevice("cpu"), Budget(left), Results({}))


PART = Part("decode", "opt-125m", (1, 2, 3, 4), seconds=30)


def worker(*lives: tuple[int, str]) -> Any:
    """Processes that measure so many cases and then die."""
    coming = iter(lives)

    def run(self: gpu.Run, part: Part, cases: list[Case]) -> Any:
        count, reason = next(coming)
        for case in cases[:count]:
            case.entries = {"ours": Entry(0.0, seconds=[1.0])}
            yield case
        return reason

    return run


@pytest.mark.parametrize(
    ("lives", "expected"),
    [
        ([(4, "")], ["", "", "", ""]),
        ([(1, "failed: a"), (2, "")], ["", "failed: a", "", ""]),
        ([(1, "failed: a"), (1, "failed: b")], ["", "failed: a", "", "failed: b"]),
        ([(0, "failed: a")], ["failed: a"] * 4),
    ],
    ids=["none", "one", "two", "at once"],
)
def test_who_dies_stops_nothing_behind(tmp_path: Path, monkeypatch, lives, expected) -> None:
    monkeypatch.setattr(gpu.Run, "_worker", worker(*lives))
    run = run_of(tmp_path, monkeypatch)
    found = [*run.part(PART)]
    assert [case.absent.get(EVERYONE, "") for case in found] == expected
    assert Results.read(tmp_path / "gpu.json").cases == found


def test_a_file_has_each_case_before_the_next_begins(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu.Run, "_worker", worker((4, "")))
    run = run_of(tmp_path, monkeypatch)
    for count, _ in enumerate(run.part(PART), 1):
        assert len(Results.read(tmp_path / "gpu.json").cases) == count


def test_what_does_not_fit_is_named_and_measured_later(tmp_path: Path, monkeypatch) -> None:
    """By --resume alone, which leaves what there is."""
    run = run_of(tmp_path, monkeypatch, left=29)
    assert [case.absent for case in run.part(PART)] == [{EVERYONE: OUT_OF_TIME}] * 4
    monkeypatch.setattr(gpu.Run, "_worker", worker((2, OUT_OF_TIME), (0, OUT_OF_TIME)))
    later = run_of(tmp_path, monkeypatch, "--resume")
    later.results = run.results
    assert len([*later.part(PART)]) == 2  # what is not measured even now stands there already
    assert [case.lacks(OUT_OF_TIME) for case in later.results.cases] == [True, True, False, False]
    monkeypatch.setattr(gpu.Run, "_worker", worker((2, "")))
    assert [case.length for case in later.part(PART)] == [3, 4]
    assert [*later.part(PART)] == []
    again = run_of(tmp_path, monkeypatch, left=0)
    again.results = later.results
    assert [*again.part(PART)] == [] and not any(c.absent for c in again.results.cases)


def test_the_rest_is_what_the_first_minutes_left(tmp_path: Path, monkeypatch) -> None:
    first, full = (run_of(tmp_path, monkeypatch, "--resume", *x) for x in ((), ("--full",)))
    case = PART.cases()[0]
    case.absent = {"ours int8": LEFT_OUT, "transformers": "no such package"}
    for run in (first, full):
        run.results.add(case)
    assert not first._asked(case) and full._asked(case)
    case.absent = {EVERYONE: f"{FAILED}a bug"}
    assert first._asked(case)


def test_the_status_tells_failures(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu.Run, "_worker", worker(*[(0, f"{FAILED}a bug")] * len(FIRST)))
    arguments = [*TRIAL, "--results", str(tmp_path), "--section", "decode"]
    assert gpu.main(arguments) == 1
    assert {case.framework for case in Results.read(tmp_path / "gpu.json").cases} == {
        "torch",
        "flax",
    }
    assert "everyone, everywhere: failed: a bug" in capsys.readouterr().out


def test_a_worker_that_fails_says_why(tmp_path: Path, monkeypatch, capfd) -> None:
    """One that hangs is killed when the time is over."""
    monkeypatch.setattr(gpu, "WORKERS", tmp_path)
    (tmp_path / "gpu_torch.py").write_text("raise RuntimeError('an illegal memory access')")
    run = run_of(tmp_path, monkeypatch)
    assert {case.absent[EVERYONE] for case in run.part(PART)} == {
        "failed: RuntimeError: an illegal memory access"
    }
    (tmp_path / "gpu_torch.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    quick = Part("decode", "opt-125m", (5,), seconds=0.1)
    run = run_of(tmp_path, monkeypatch, left=1)
    assert [case.absent for case in run.part(quick)] == [{EVERYONE: OUT_OF_TIME}]


def test_the_models_share_their_weights() -> None:
    weights = random_weights(TINY_CONFIG, torch.bfloat16, CPU)
    eager, sdpa = (ours(TINY_CONFIG, weights, kernel) for kernel in ("eager", "sdpa"))
    for name, parameter in eager.named_parameters():
        assert parameter is weights[name] is sdpa.get_parameter(name)
    assert eager.lm_head.weight is eager.get_input_embeddings().weight
    again = random_weights(TINY_CONFIG, torch.bfloat16, CPU)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    tokens = random_tokens(TINY_CONFIG, 2, 9, CPU)
    assert tokens.shape == (2, 9) and tokens.min() >= 4


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="--device cpu --tiny"):
        TorchDevice("cuda")


def test_memory_is_the_peak_beyond_what_lay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake of the GPU's book-keeping: so many bytes now, so many at most since the reset."""
    book = SimpleNamespace(now=100, peak=900)

    def take(size: int) -> None:
        book.now += size
        book.peak = max(book.peak, book.now)

    fakes = {
        "reset_peak_memory_stats": lambda _: vars(book).update(peak=book.now),
        "memory_allocated": lambda _: book.now,
        "max_memory_allocated": lambda _: book.peak,
        "synchronize": lambda _: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(TorchDevice, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = TorchDevice("cpu")
    assert device.peak(lambda: (take(50), take(-20))) == 50

    class Layer(torch.nn.Module):
        def forward(self) -> None:
            take(7)
            take(-7)

    layer = Layer()
    assert device.peak_of_module(layer, lambda: (take(1000), layer(), take(1000))) == 7
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_distances() -> None:
    logits = np.zeros((3, 1, 4), np.float32)
    logits[:, 0] = [0.0, 1.0, 0.98, 0.0]
    expected = Decoded([[1, 1, 1]], logits)
    assert decoded_distance(expected, expected) == 0
    swapped = Decoded([[1, 2, 3]], logits + np.array([0, 0, 9], np.float32)[:, None, None])
    assert decoded_distance(expected, swapped) == pytest.approx(0.02)  # what follows does not count
    assert decoded_distance(expected, Decoded([[1, 1, 3]], logits)) == pytest.approx(1.0)
    assert decoded_distance(expected, Decoded([[1, 1, 1]], logits * 1.1)) == pytest.approx(0.1)
    pair = torch.tensor([2.0, 100.0])
    assert largest_relative(pair, torch.tensor([2.2, 101.0])) == pytest.approx(0.1)
