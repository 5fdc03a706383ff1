# SPDX-License-Identifier: Apache-2.0
"""`device_map`: weights that lie elsewhere and are brought in by accelerate give the same numbers."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_checkpoint import write_random_checkpoint
from conversion import convert
from examples import large_model
from opt_core import InputError, OPTConfig, UnsupportedError
from opt_torch import OPTForCausalLM, OPTForSequenceClassification, OPTModel
from tests.cases import case

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 2]])
PRE_NORM = case("pre_norm").folder
CASES = ("pre_norm", "post_norm", "untied_gelu")
IN_MEMORY = "model.decoder.layers.1"


def mixed(config: OPTConfig) -> dict[str, str]:
    """One layer in memory, and every kind of module on disk."""
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    names = [f"model.decoder.{name}" for name, _ in model.model.decoder.named_children()]
    names.remove("model.decoder.layers")
    names += [f"model.decoder.layers.{index}" for index in range(config.num_hidden_layers)]
    return {name: "cpu" if name == IN_MEMORY else "disk" for name in [*names, "lm_head"]}


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("auto", "float32"),
        ("sequential", "float32"),
        ("disk", "bfloat16"),
        ("mixed", "float32"),
        ("mixed", "bfloat16"),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_wherever_the_weights_lie(
    name: str, how: str, dtype: str, tmp_path: Path
) -> None:
    """In the file's own dtype nothing is written; else what is written goes with the model."""
    expected = OPTForCausalLM.from_pretrained(case(name).folder, dtype=dtype)
    model = OPTForCausalLM.from_pretrained(
        case(name).folder,
        dtype=dtype,
        device_map=mixed(expected.config) if how == "mixed" else how,
        offload_folder=tmp_path,
        max_memory={"cpu": "60KB"} if how in ("auto", "sequential") else None,
    )
    assert "disk" in model.hf_device_map.values()
    assert any(parameter.is_meta for parameter in model.parameters())
    assert bool([*tmp_path.iterdir()]) == (dtype == "bfloat16")
    assert (model.device, model.dtype) == (expected.device, expected.dtype)
    for _ in range(2):
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
    options = {"max_new_tokens": 4, "num_beams": 2}
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))
    del model
    gc.collect()
    assert not [*tmp_path.iterdir()]


def test_accelerate_divides_no_layer() -> None:
    model = OPTForCausalLM.from_pretrained(
        PRE_NORM, device_map="balanced", max_memory={"cpu": "60KB"}
    )
    layers = [name for name in model.hf_device_map if ".layers." in name]
    assert layers == [f"model.decoder.layers.{index}" for index in range(3)]
    assert {model.hf_device_map[name] for name in layers} == {"cpu", "disk"}


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), {"": "cpu"}, "auto"])
def test_a_device_that_takes_all(device: Any) -> None:
    """Such a model is like any other: it can be trained and saved."""
    model = OPTForCausalLM.from_pretrained(PRE_NORM, device_map=device)
    assert model.hf_device_map in ({"": "cpu"}, {"": torch.device("cpu")})
    model(IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("model_class", [OPTModel, OPTForSequenceClassification])
@pytest.mark.parametrize("format", ["safetensors", "h5"])
def test_other_classes_and_formats(model_class: Any, format: str, tmp_path: Path) -> None:
    """What is stored otherwise than PyTorch needs it, or not at all, is written for later."""
    convert(PRE_NORM, tmp_path / "source", to=format, architecture="OPTForCausalLM")

    def load(**options: Any) -> Any:
        torch.manual_seed(0)
        if model_class is OPTModel:
            return model_class.from_pretrained(tmp_path / "source", **options)
        with pytest.warns(UserWarning, match="initialised anew"):
            return model_class.from_pretrained(tmp_path / "source", **options)

    expected, model = load(), load(device_map="disk", offload_folder=tmp_path / "folder")
    written = (tmp_path / "folder").exists()
    assert written == (format == "h5" or model_class is OPTForSequenceClassification)
    for found, value in zip(model(IDS).to_tuple(), expected(IDS).to_tuple(), strict=True):
        if isinstance(found, torch.Tensor):
            assert torch.equal(found, value)


def test_what_an_offloaded_model_refuses(tmp_path: Path) -> None:
    model = OPTForCausalLM.from_pretrained(PRE_NORM, device_map="disk")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UnsupportedError, match="embed_tokens.weight has no values in memory"):
        model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="can't move a model"):
        model.to("cpu")
    with pytest.raises(UnsupportedError, match="expected weights in memory"):
        model.prepare_for_decoding(weights="int8")
    with pytest.raises(UnsupportedError, match="resize_token_embeddings: expected weights in mem"):
        model.resize_token_embeddings(model.config.vocab_size + 8)
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size
    assert not [*tmp_path.iterdir()]


FULL = mixed(case("pre_norm").config)
WRONG: dict[str, tuple[Any, str]] = {
    "unknown": (
        {**FULL, "model.decoder.layer.0": "cpu"},
        "names 'model.decoder.layer.0'.*Did you mean 'model.decoder.layers.0'",
    ),
    "left out": (
        {name: place for name, place in FULL.items() if name != IN_MEMORY},
        f"one entry that {IN_MEMORY}.* belongs to, found none",
    ),
    "twice": ({**FULL, "model": "cpu"}, "found it in 'model.*' and 'model'"),
    "torn": ({**FULL, "lm_head": "cpu"}, "tied to the word embeddings.*found disk.*and cpu"),
    "no device": ("anywhere", "expected one of auto, .* found 'anywhere'"),
    "no number": ({"": -7}, "found -7"),
    "no kind": ({"": None}, "found None"),
}


@pytest.mark.parametrize("kind", [*WRONG])
def test_maps_that_are_none(kind: str) -> None:
    device_map, message = WRONG[kind]
    with pytest.raises(InputError, match=f"(?s)device_map.*{message}"):
        OPTForCausalLM.from_pretrained(PRE_NORM, device_map=device_map)


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"expected an offload_folder.*embed_tokens.*bfloat16"):
        OPTForCausalLM.from_pretrained(PRE_NORM, device_map="disk", dtype="bfloat16")
    with pytest.raises(InputError, match="max_memory.*expected a device_map"):
        OPTForCausalLM.from_pretrained(PRE_NORM, max_memory={"cpu": "1GB"})
    folder, devices = case("untied_gelu").folder, {"model": "meta", "lm_head": "vulkan"}
    with pytest.raises(UnsupportedError, match="one device that computes.*meta and vulkan"):
        OPTForCausalLM.from_pretrained(folder, device_map=devices)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UnsupportedError, match="pip install accelerate"):
        OPTForCausalLM.from_pretrained(PRE_NORM, device_map="auto")


PEAKS = """
import sys, torch
from pathlib import Path
from opt_torch import OPTForCausalLM

def memory(field):
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index(field + ":") + 1]) * 1024

def run(source, device, dtype):
    options = {"device_map": device, "dtype": dtype, "offload_folder": sys.argv[3]}
    model = OPTForCausalLM.from_pretrained(source, **options)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)

run(sys.argv[1], "disk", "float32")
for how in (("disk", "float32"), ("disk", "bfloat16"), ("cpu", "float32")):
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    run(sys.argv[2], *how)
    print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_model_on_disk_is_never_in_memory(tmp_path: Path) -> None:
    """Neither while it is loaded nor while it runs: a fifth of it at most, read or cast."""
    config = OPTConfig(
        vocab_size=1000,
        hidden_size=512,
        ffn_dim=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    write_random_checkpoint(tmp_path / "large", config)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 150e6

    arguments = [PRE_NORM, tmp_path / "large", tmp_path / "folder"]
    command = [sys.executable, "-c", PEAKS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    read, cast, whole = map(int, done.stdout.split())
    assert 0.8 * size < whole < 1.2 * size
    assert max(read, cast) < 0.2 * size


def test_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It really uses the disk, and answers as the model in memory does."""
    arguments = ["--offload-folder", str(tmp_path), "--max-new-tokens", "3"]
    large_model.main([*arguments, "ten plus one is"])
    shown = capsys.readouterr().out
    assert "  disk  model.decoder.layers" in shown and "   cpu  model.decoder.embed" in shown
    assert "ten plus one is eleven\n" in shown
    mapped = ["--device-map", "cpu", "--mmap", "--max-new-tokens", "3", "ten plus one is"]
    large_model.main(mapped)
    assert "ten plus one is eleven\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected such as cpu=30GB, found 'cpu'"):
        large_model.main(["--max-memory", "cpu"])
    assert large_model.limits(["0=1GB", "cpu=2GB"]) == {0: "1GB", "cpu": "2GB"}
