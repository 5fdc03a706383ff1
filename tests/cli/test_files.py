# SPDX-License-Identifier: Apache-2.0
"""`opt-zoo inspect`, of whole checkpoints and of damaged ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from opt_core import HubError, __version__
from opt_zoo import render
from opt_zoo.inspection import File, inspect_checkpoint
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


def test_a_head_that_the_configuration_says_is_the_embedding(
    opt_zoo: Runner, model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = opt_zoo("inspect", str(folder))
    assert done.exit_code == 1
    assert "lm_head.weight is not the embedding, though tie_word_embeddings" in " ".join(
        done.stdout.split()
    )
    done = opt_zoo("verify", str(model), str(folder))
    assert done.exit_code == 1 and "lm_head.weight" in done.stdout


@pytest.mark.parametrize(
    ("name", "container", "dialect"),
    [
        ("bin", "torch", "pt"),
        ("bin_fp16_decoder", "torch", "pt"),
        ("safetensors_base", "safetensors", "pt"),
        ("tf_safetensors", "safetensors", "tf"),
        ("flax_safetensors", "safetensors", "flax"),
        ("h5", "hdf5", "tf"),
        ("msgpack_sharded", "msgpack", "flax"),
    ],
)
def test_inspect_other_formats(opt_zoo: Runner, name: str, container: str, dialect: str) -> None:
    found = json.loads(opt_zoo("inspect", str(FORMATS / name), "--json").stdout)
    assert found["fits"] and found["problem"] is None and not found["missing"]
    assert (found["container"], found["dialect"]) == (container, dialect)
    in_files = [file["tensors"] for file in found["files"]]
    assert sum(in_files) == len(found["tensors"]) == sum(found["dtypes"].values())
    for file in found["files"]:
        assert file["nbytes"] == (FORMATS / name / file["name"]).stat().st_size


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


DAMAGED = {  # a golden checkpoint of one file -> its container
    "safetensors": "safetensors",
    "bin": "torch",
    "bin_legacy": "torch",
    "h5": "hdf5",
    "msgpack": "msgpack",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_inspect_a_damaged_file(opt_zoo: Runner, name: str, tmp_path: Path) -> None:
    directory = shutil.copytree(FORMATS / name, tmp_path / "in")
    (file,) = (entry for entry in directory.iterdir() if entry.name != "config.json")
    file.write_bytes(file.read_bytes()[:-300])
    done = opt_zoo("inspect", str(directory), "--json")
    assert done.exit_code == 1 and done.stderr == ""
    found = json.loads(done.stdout)
    assert not found["fits"] and str(file) in found["problem"]
    assert found["container"] == DAMAGED[name] and found["dialect"] is None
    (shown,) = found["files"]
    assert (shown["name"], shown["nbytes"]) == (file.name, file.stat().st_size)
    assert shown["tensors"] is None and shown["problem"] == found["problem"]
    assert found["config"]["hidden_size"] == 16  # all the same
    text = opt_zoo("inspect", str(directory))
    assert text.exit_code == 1 and f"{file.name}  " in text.stdout
    assert "damaged" in text.stdout and "fetch it again" in " ".join(text.stdout.split())


@pytest.mark.parametrize("name", ["safetensors_sharded", "bin_sharded", "h5_sharded"])
def test_of_a_damaged_checkpoint_each_file_is_told(
    opt_zoo: Runner, name: str, tmp_path: Path
) -> None:
    directory = shutil.copytree(FORMATS / name, tmp_path / "in")
    first, second, third = sorted(directory.glob("*-0000*"))
    first.write_bytes(first.read_bytes()[:-300])
    third.unlink()
    (directory / "config.json").write_text("{")
    (directory / "notes.txt").write_text("no weights")
    done = opt_zoo("inspect", str(directory), "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    cut, whole, gone = found["files"]
    assert (cut["name"], cut["tensors"]) == (first.name, None) and str(first) in cut["problem"]
    assert whole == {
        "name": second.name,
        "nbytes": second.stat().st_size,
        "tensors": len(found["tensors"]),
        "problem": None,
    }
    assert len(found["tensors"]) > 0 and found["dialect"] == ("tf" if "h5" in name else "pt")
    assert (gone["name"], gone["nbytes"], gone["tensors"]) == (third.name, None, None)
    assert "expected it beside the index" in gone["problem"]
    assert third.name in found["problem"] and "config.json" in found["problem"]
    assert found["config"] is None and found["architecture"] is None
    text = opt_zoo("inspect", str(directory)).stdout
    assert f"{third.name}  missing" in text and f"{second.name}  " in text
    with_index = opt_zoo("inspect", str(next(directory.glob("*.index.json"))), "--json")
    assert json.loads(with_index.stdout)["files"] == found["files"]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}']
)
def test_a_damaged_index_does_not_hide_the_files(
    opt_zoo: Runner, content: str, tmp_path: Path
) -> None:
    directory = shutil.copytree(FORMATS / "safetensors_sharded", tmp_path / "in")
    (directory / "model.safetensors.index.json").write_text(content)
    done = opt_zoo("inspect", str(directory), "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and "index.json" in found["problem"]
    assert all(file["tensors"] for file in found["files"]) and len(found["files"]) == 3
    assert not found["missing"] and not found["fits"]


def test_a_directory_without_weights(opt_zoo: Runner, model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "config.json", tmp_path)
    done = opt_zoo("inspect", str(tmp_path), "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["files"] == found["tensors"] == []
    assert "expected one of model.safetensors" in found["problem"]
    assert found["config"]["hidden_size"] == 32


def test_weights_under_an_unknown_name_are_seen(opt_zoo: Runner, tmp_path: Path) -> None:
    shutil.copy(FORMATS / "safetensors" / "model.safetensors", tmp_path / "adapter.safetensors")
    found = json.loads(opt_zoo("inspect", str(tmp_path), "--json").stdout)
    assert [file["name"] for file in found["files"]] == ["adapter.safetensors"]
    assert found["container"] == "safetensors" and not found["fits"]


def test_what_is_not_there_is_an_error(opt_zoo: Runner) -> None:
    assert isinstance(opt_zoo("inspect", "/no/such/model", "--json").exception, HubError)


def test_a_broken_configuration_is_damage(opt_zoo: Runner, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text("{")
    done = opt_zoo("inspect", str(tmp_path), "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1
    assert "config.json" in found["problem"] and len(found["tensors"]) == 36


def test_an_assumed_architecture_is_said(opt_zoo: Runner, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    config = {**json.loads((model / "config.json").read_text()), "architectures": ["GPT2LMHead"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = json.loads(opt_zoo("inspect", str(tmp_path), "--json").stdout)
    assert found["architecture"] == "OPTForCausalLM" and "GPT2LMHead" in found["assumption"]


def test_what_a_file_names_cannot_reach_the_terminal(model: Path) -> None:
    found = inspect_checkpoint(model)
    evil = "\x1b[31mred\n\u202egnp"
    found = replace(
        found,
        files=(File(evil, 1, None, evil),),
        tensors=((evil, "float32", (1,), 4),),
        missing=(evil,),
        problems=(evil,),
    )
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render.inspection(found))
    assert capture.get().count(r"\x1b[31mred") == 4
    assert "\x1b[31mred" not in capture.get() and "\u202e" not in capture.get()


def test_a_narrow_terminal_elides_nothing(model: Path) -> None:
    console = Console(width=40)
    with console.capture() as capture:
        console.print(render.inspection(inspect_checkpoint(model)))
    assert "\N{HORIZONTAL ELLIPSIS}" not in capture.get()
