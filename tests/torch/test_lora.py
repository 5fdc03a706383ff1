# SPDX-License-Identifier: Apache-2.0
"""The example of LoRA on a rounded base: it learns, goes on exactly, and merges into the unrounded one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from examples import lora_torch
from examples.training import Log
from opt_core.assets import TINY_SUMS
from opt_core.assets.sums import TrainingData
from opt_torch import OPTForCausalLM


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = lora_torch.train_and_held_out

    def some(*arguments: Any) -> tuple[TrainingData, TrainingData]:
        train, held_out = everything(*arguments)
        return train, TrainingData(held_out.input_ids[::20], held_out.labels[::20])

    monkeypatch.setattr(lora_torch, "train_and_held_out", some)


@pytest.mark.parametrize(("base", "steps", "right"), [("int8", 60, 0.1), ("nf4", 15, 0.0)])
def test_it_learns(base: str, steps: int, right: float, tmp_path: Path) -> None:
    """Of the numbers that could be the answer there are nearly two hundred."""
    lora_torch.main(["--base", base, "--steps", str(steps), "--output", str(tmp_path)])
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["held_out_loss"] < log[0]["loss"] / 3
    assert log[-1]["rows_right"] >= right
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapter} == {
        *lora_torch.LORA_TARGETS
    }
    base_model = OPTForCausalLM.from_pretrained(TINY_SUMS)
    adapted = PeftModel.from_pretrained(base_model, tmp_path / "adapter")
    merged = OPTForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(merged(ids).logits, adapted(input_ids=ids).logits)


def test_going_on_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped two steps after a state was saved, with dropout."""
    source, whole, stopped = (tmp_path / name for name in ("source", "whole", "stopped"))
    OPTForCausalLM.from_pretrained(TINY_SUMS, dropout=0.1).save_pretrained(source)
    for file in TINY_SUMS.glob("*token*"):
        (source / file.name).write_bytes(file.read_bytes())
    common = ["--model", str(source), "--steps", "7", "--save-every", "3", "--batch-size", "8"]
    common += ["--accumulate", "2", "--output"]
    lora_torch.main([*common, str(whole)])
    add = Log.add

    def stop(log: Log, step: int, **values: float) -> None:
        if step == 5:
            raise KeyboardInterrupt
        add(log, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            lora_torch.main([*common, str(stopped)])
    state = torch.load(stopped / "state", weights_only=True)
    assert state["step"] == 3 and all("lora_" in name for name in state["weights"])
    lora_torch.main([*common, str(stopped), "--resume"])
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        lora_torch.main(["--help"])
    assert "--base {float32,int8,nf4}" in capsys.readouterr().out
