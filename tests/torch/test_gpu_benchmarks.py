# SPDX-License-Identifier: Apache-2.0
"""The benchmarks on a GPU, tried on the CPU with a small model; transformers is absent, or a fake."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import flash_attention, gpu
from benchmarks.gpu_case import Case, Results
from benchmarks.gpu_device import TorchDevice
from benchmarks.gpu_jobs import Decoded, decoded_distance, largest_relative
from benchmarks.gpu_models import ours, random_tokens, random_weights
from benchmarks.gpu_table import TINY_CONFIG
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


def measured(main: Any, path: Path, *arguments: str) -> tuple[int, list[Case]]:
    status = main([*TRIAL, *arguments, "--json", str(path)])
    return status, Results.read(path).cases


def test_flash_attention_without_a_gpu(tmp_path: Path, capsys) -> None:
    path = tmp_path / "flash.json"
    status, cases = measured(flash_attention.main, path, "--length", "16", "--batch", "3")
    assert status == 0
    assert [(c.size, c.batch, c.length, c.padded) for c in cases] == [
        ("tiny", 3, 16, False),
        ("tiny", 3, 16, True),
    ]
    for case in cases:
        assert [*case.entries] == ["eager", "sdpa"] and not case.differing
        assert 0 < case.entries["sdpa"].error < 1e-2
        assert case.timed("sdpa") and case.entries["sdpa"].peak is None
        assert "expected a CUDA device, found cpu" in case.absent[FLASH]
        assert "transformers" in case.absent["transformers eager"]
    assert "| tiny | 16 | 3 | left |" in capsys.readouterr().out


def test_a_peer_that_computes_something_else_is_not_timed(
    tmp_path: Path, fake_transformers: None, capsys
) -> None:
    path = tmp_path / "flash.json"
    status, cases = measured(flash_attention.main, path, "--length", "16", "--batch", "1")
    assert status == 1
    for case in cases:
        assert case.differing == ["transformers sdpa"]
        assert case.timed("transformers eager") and not case.timed("transformers sdpa")
        assert case.entries["transformers eager"].error == 0
    assert "LOGITS DIFFER: transformers sdpa in inference, tiny, 1 x 16" in capsys.readouterr().err


def test_half_of_the_rows_are_padded() -> None:
    batch = flash_attention.Batch.random(TINY_CONFIG, 3, 16, True, CPU)
    assert batch.mask.sum(1).tolist() == [12, 12, 16]
    assert ((batch.ids == 1) == (batch.mask == 0)).all()
    assert batch.mask[0, :4].sum() == 0
    assert flash_attention.Batch.random(TINY_CONFIG, 3, 16, False, CPU).mask is None


def test_drawing_later_measures_nothing(tmp_path: Path) -> None:
    path, picture = tmp_path / "flash.json", tmp_path / "flash.png"
    Results({}).write(path)
    assert flash_attention.main(["--from-json", str(path)]) == 0
    flash_attention.main(
        [*TRIAL, "--length", "16", "--batch", "1", "--json", str(tmp_path / "2.json")]
    )
    status = flash_attention.main(["--from-json", str(tmp_path / "2.json"), "--plot", str(picture)])
    assert status == 0 and picture.stat().st_size > 1000


def test_decoding_prefill_and_training_without_a_gpu(tmp_path: Path, capsys) -> None:
    """A run in two parts, one file."""
    path = tmp_path / "gpu.json"
    torch_only = ("--framework", "torch")
    sections = ("--section", "card", "--section", "prefill", "--section", "training")
    assert measured(gpu.main, path, *torch_only, *sections)[0] == 0
    status, cases = measured(gpu.main, path, *torch_only, "--section", "decode")
    assert status == 0
    assert json.loads(path.read_text())["card"].keys() == {
        "copy",
        "read",
        "product",
        "bytes",
        "side",
    }
    found = {(case.section, case.length): case for case in cases}
    assert [*found] == [("prefill", 16), ("prefill", 31), ("training", 32), ("decode", 8)]
    decode = found["decode", 8]
    for name in ("ours", "ours static", "ours int8"):
        assert decode.timed(name), decode.absent
    assert decode.entries["ours static"].error == 0 < decode.entries["ours int8"].error
    for key in [key for key in found if key[0] != "decode"]:
        assert found[key].timed("ours")
        assert "expected a CUDA device" in found[key].absent["ours flash"]
    out = capsys.readouterr().out
    assert "of bandwidth" in out and "to transformers static" in out


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
