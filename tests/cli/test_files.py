# SPDX-License-Identifier: Apache-2.0
"""`opt-zoo inspect` and `opt-zoo convert`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from opt_core import __version__
from opt_zoo import render
from opt_zoo.inspection import inspect_checkpoint
from tests.cli.conftest import Runner

FORMATS = Path(__file__).parent.parent / "golden" / "formats" / "pre_norm"


def test_version(opt_zoo: Runner) -> None:
    assert opt_zoo("--version").stdout == f"opt-zoo {__version__}\n"


def test_inspect(opt_zoo: Runner, model: Path) -> None:
    done = opt_zoo("inspect", str(model))
    assert done.exit_code == 0
    for expected in ("model.decoder.layers.1.fc2.weight", "(32, 64)", "float32", "36 (36 float32)"):
        assert expected in done.stdout
    assert "and no other" in done.stdout


@pytest.mark.parametrize("name", ["bin", "bin_fp16_decoder", "tf_safetensors", "safetensors_base"])
def test_inspect_other_formats(opt_zoo: Runner, name: str) -> None:
    found = json.loads(opt_zoo("inspect", str(FORMATS / name), "--json").stdout)
    assert found["fits"] and not found["missing"]
    assert found["format"] == ("torch" if name.startswith("bin") else "safetensors")


def test_inspect_a_file_alone(opt_zoo: Runner, model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "model.safetensors", tmp_path)
    done = opt_zoo("inspect", str(tmp_path / "model.safetensors"))
    assert done.exit_code == 1
    assert "There is no config.json" in done.stdout


def test_inspect_names_what_is_missing_unexpected_and_of_another_shape(
    opt_zoo: Runner, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    config.update(num_hidden_layers=3, enable_bias=True, ffn_dim=128)
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = opt_zoo("inspect", str(tmp_path), "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1
    assert "model.decoder.layers.2.fc1.weight" in found["missing"]
    assert any("layers.0.fc1.weight: expected (128, 32)" in text for text in found["mismatched"])

    config.update(num_hidden_layers=1, ffn_dim=64)
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = opt_zoo("inspect", str(tmp_path)).stdout
    assert "unexpected: model.decoder.layers.1.fc1.weight" in text


def test_inspect_a_damaged_file(opt_zoo: Runner, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    done = opt_zoo("inspect", str(tmp_path))
    assert done.exit_code == 1
    assert done.stderr.startswith("damaged: ") and "model.safetensors" in done.stderr


def test_a_broken_configuration_is_damage(opt_zoo: Runner, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text("{")
    done = opt_zoo("inspect", str(tmp_path))
    assert done.exit_code == 1
    assert done.stderr.startswith("damaged: ") and "config.json" in done.stderr


def test_an_assumed_architecture_is_said(opt_zoo: Runner, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "in")
    config = {**json.loads((model / "config.json").read_text()), "architectures": ["GPT2LMHead"]}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    found = json.loads(opt_zoo("inspect", str(tmp_path / "in"), "--json").stdout)
    assert found["architecture"] == "OPTForCausalLM" and "GPT2LMHead" in found["assumption"]
    done = opt_zoo("convert", str(tmp_path / "in"), str(tmp_path / "out"))
    assert "OPTForCausalLM (assumed: " in done.stdout


def test_what_a_file_names_cannot_reach_the_terminal(model: Path) -> None:
    found = inspect_checkpoint(model)
    evil = "\x1b[31mred\n\u202egnp"
    found = replace(
        found,
        files={evil: 1},
        tensors=((evil, "float32", (1,), 4),),
        missing=(evil,),
        problem=evil,
    )
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render.inspection(found))
    assert capture.get().count(r"\x1b[31mred\n\u202egnp") == 4
    assert "\x1b[31mred" not in capture.get() and "\u202e" not in capture.get()


def test_a_narrow_terminal_elides_nothing(model: Path) -> None:
    console = Console(width=40)
    with console.capture() as capture:
        console.print(render.inspection(inspect_checkpoint(model)))
    assert "\N{HORIZONTAL ELLIPSIS}" not in capture.get()


def test_convert(opt_zoo: Runner, tmp_path: Path) -> None:
    target = str(tmp_path / "out")
    done = opt_zoo("convert", str(FORMATS / "bin"), target, "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert "OPTForCausalLM" in done.stdout
    found = json.loads(opt_zoo("inspect", target, "--json").stdout)
    assert found["fits"] and list(found["dtypes"]) == ["bfloat16"]
    assert found["metadata"] == {"format": "pt"}
