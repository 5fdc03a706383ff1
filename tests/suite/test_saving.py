# SPDX-License-Identifier: Apache-2.0
"""`save_pretrained`: the same bits there and back, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from opt_core import InputError
from tests.backends.base import Backend
from tests.cases import CASES, bits, case


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", ["OPTForCausalLM", "OPTModel"])
def test_save_and_load_are_exact(
    backend: Backend, tmp_path: Path, name: str, architecture: str
) -> None:
    model = backend.load(case(name).folder, architecture=architecture)
    before = backend.canonical_weights(model)
    backend.save(model, tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert bits(load_file(tmp_path / "model.safetensors")) == bits(before)
    assert bits(
        backend.canonical_weights(backend.load(tmp_path, architecture=architecture))
    ) == bits(before)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == [architecture]
    assert saved["torch_dtype"] == "float32"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_saved_as_such(backend: Backend, tmp_path: Path, dtype: str) -> None:
    model = backend.load(case("post_norm").folder, dtype=dtype)
    backend.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    again = backend.canonical_weights(backend.load(tmp_path, dtype="auto"))
    assert bits(again) == bits(backend.canonical_weights(model))
    assert {str(array.dtype) for array in again.values()} == {dtype}


def test_shards(backend: Backend, tmp_path: Path) -> None:
    model = backend.load(case("pre_norm").folder)
    before = backend.canonical_weights(model)
    backend.save(model, tmp_path, max_shard_size="12KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(before)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in before.values())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and {f.name for f in files} == set(index["weight_map"].values())
    assert bits(backend.canonical_weights(backend.load(tmp_path))) == bits(before)
    with pytest.raises(InputError, match="max_shard_size"):
        backend.save(model, tmp_path, max_shard_size="many")


def test_saving_over_the_directory_that_it_was_loaded_from(backend: Backend, folder: Path) -> None:
    """The weights may be a view on the file that is about to be replaced."""
    model = backend.load(folder)
    before = backend.canonical_weights(model)
    ids = np.array([[5, 6, 7]])
    logits = backend.forward(model, input_ids=ids)["logits"]
    for size in ("5GB", "12KB", "5GB"):
        backend.save(model, folder, max_shard_size=size)
        assert bits(backend.canonical_weights(model)) == bits(before)
        assert bits(backend.canonical_weights(backend.load(folder))) == bits(before)
    assert np.array_equal(backend.forward(model, input_ids=ids)["logits"], logits)
    assert {f.name for f in folder.iterdir()} >= {"case.json", "outputs.npz"}  # not ours: they stay
    assert len(list(folder.glob("*.safetensors*"))) == 1


def test_saving_keeps_what_opt_does_not_know(backend: Backend, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    extras = {"prefix": "</s>", "embed_dim": 768, "nested": {"list": [1, None, "é"]}}
    (folder / "config.json").write_text(json.dumps({**config, **extras}))
    model = backend.load(folder)
    backend.save(model, folder / "again")
    saved = json.loads((folder / "again" / "config.json").read_text())
    assert {key: saved[key] for key in extras} == extras
    own = {key for key in config if key not in ("transformers_version", "architectures")}
    assert {key: saved[key] for key in own} == {key: config[key] for key in own}
    generation = json.loads((folder / "again" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (2, 2)


def test_saving_changes_neither_model_nor_config(backend: Backend, tmp_path: Path) -> None:
    model = backend.load(case("post_norm").folder, dtype="float16")
    before, config = bits(backend.canonical_weights(model)), backend.config(model).to_dict()
    backend.save(model, tmp_path)
    assert backend.config(model).to_dict() == config
    assert bits(backend.canonical_weights(model)) == before


def test_a_new_model_can_be_saved_and_loaded(backend: Backend, tmp_path: Path) -> None:
    model = backend.create(case("post_norm").config, seed=5)
    backend.save(model, tmp_path)
    assert bits(backend.canonical_weights(backend.load(tmp_path))) == bits(
        backend.canonical_weights(model)
    )


def test_not_safetensors_but_the_framework_s_own(backend: Backend, tmp_path: Path) -> None:
    """What code written for transformers asks for by safe_serialization=False."""
    own = {"torch": "pytorch_model.bin", "tf": "tf_model.h5", "flax": "flax_model.msgpack"}
    model = backend.load(case("post_norm").folder)
    before = bits(backend.canonical_weights(model))
    backend.save(model, tmp_path, safe_serialization=True)
    assert (tmp_path / "model.safetensors").is_file()
    backend.save(model, tmp_path, safe_serialization=False)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", own[backend.name]}
    assert bits(backend.canonical_weights(backend.load(tmp_path))) == before
