# SPDX-License-Identifier: Apache-2.0
"""Conversion of every format that the reference writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from conversion import convert
from opt_core import CheckpointError, ConfigError, InputError, OPTConfig
from opt_core.checkpoints import CheckpointReader

FORMATS = Path(__file__).parent.parent / "golden" / "formats"
READABLE = (
    "bin",
    "bin_legacy",
    "bin_sharded",
    "flax_safetensors",
    "safetensors",
    "safetensors_sharded",
    "tf_safetensors",
)


def tensors(directory: Path) -> dict[str, np.ndarray]:
    with CheckpointReader.open(directory) as reader:
        return {name: tensor.read() for name, tensor in reader.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of a golden checkpoint that a test may change."""
    return shutil.copytree(FORMATS / "pre_norm" / "safetensors", tmp_path / "source")


@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize("model", ["pre_norm", "post_norm"])
def test_every_format_becomes_the_same_checkpoint(model: str, name: str, tmp_path: Path) -> None:
    expected = tensors(FORMATS / model / "safetensors")
    convert(FORMATS / model / name, tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    config = OPTConfig.from_json_file(tmp_path / "out" / "config.json")
    assert config.architectures == ("OPTForCausalLM",)


def test_shards_dtype_and_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = convert(
        FORMATS / "pre_norm" / "bin",
        tmp_path / "out",
        dtype="bfloat16",
        max_shard_size="5KB",
        progress=lambda written, total: seen.append((written, total)),
    )
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert "model.safetensors.index.json" in names and "model-00001-of-00004.safetensors" in names
    assert {a.dtype for a in tensors(tmp_path / "out").values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    total = done.plan.bytes_written
    assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)


def test_tokenizer_and_generation_files_come_along(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "generation_config.json").write_text('{"max_length": 7}')
    done = convert(source, tmp_path / "out")
    assert set(done.plan.copied) == {"generation_config.json", "tokenizer.json"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'


def test_a_target_with_files_is_kept_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    source = FORMATS / "pre_norm" / "bin"
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match=r"expected a new or empty directory.*--overwrite"):
        convert(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    convert(source, tmp_path, overwrite=True)
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_texts_of_a_former_model_go(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    for name in ("merges.txt", "generation_config.json", "note.txt"):
        (target / name).write_text("former")
    (source / "vocab.json").write_text("{}")
    convert(source, target, overwrite=True)
    names = {path.name for path in target.iterdir()}
    assert names == {"config.json", "model.safetensors", "note.txt", "vocab.json"}


def test_names_of_targets(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="found an empty name"):
        convert(source, "", overwrite=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert(source, "~/out").target == tmp_path / "out"


def test_other_shapes_are_no_advice_for_another_call(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["ffn_dim"] *= 2
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out")
    assert "ignore_mismatched_sizes" not in str(caught.value)


def test_in_place(source: Path) -> None:
    expected = tensors(source)
    convert(source, source, dtype="float16", overwrite=True)
    for name, array in tensors(source).items():
        np.testing.assert_array_equal(array, expected[name].astype(np.float16))


def test_a_value_beyond_float16_is_refused(source: Path, tmp_path: Path) -> None:
    arrays = tensors(source)
    name = "model.decoder.layers.1.fc1.weight"
    arrays[name][0, 0] = 1e5
    save_file(arrays, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}: expected values that float16.*100000"):
        convert(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_without_config(source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"expected config\.json beside the weights"):
        convert(source, tmp_path / "out")


def declare(folder: Path, architecture: str) -> None:
    """Changes the class of model that a configuration names."""
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config))


def test_a_head_that_is_missing_is_reported(source: Path, tmp_path: Path) -> None:
    declare(source, "OPTForSequenceClassification")
    done = convert(source, tmp_path / "out")
    assert done.plan.missing == ("score.weight",) and done.plan.dropped == ()
    assert tensors(tmp_path / "out").keys() == tensors(source).keys()


def test_a_head_of_another_class_is_not_lost_silently(tmp_path: Path) -> None:
    source = shutil.copytree(FORMATS / "pre_norm" / "safetensors_untied", tmp_path / "source")
    declare(source, "OPTForQuestionAnswering")
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight belongs to another.*--architecture"
    ):
        convert(source, tmp_path / "out")
    done = convert(source, tmp_path / "out", architecture="OPTModel")
    assert done.plan.dropped == ("lm_head.weight",) and done.plan.missing == ()
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    config = OPTConfig.from_json_file(tmp_path / "out" / "config.json")
    assert config.architectures == ("OPTModel",)
    with pytest.raises(InputError, match="Unknown architecture 'GPT2Model': expected one of OPTM"):
        convert(source, tmp_path / "no", architecture="GPT2Model")


def test_module_command(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "conversion", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and again.stderr.startswith("error: ")
