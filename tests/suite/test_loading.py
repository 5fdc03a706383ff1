# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained`: strict about every tensor, and exact."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from opt_core import CheckpointError, ConfigError, InputError, OPTConfig
from opt_core.checkpoints import LazyTensor
from tests.backends.base import Array, Backend
from tests.cases import bits, case, write
from tests.tolerances import TOLERANCES, assert_close

HEAD, EMBEDDING = "lm_head.weight", "model.decoder.embed_tokens.weight"
FC1 = "model.decoder.layers.1.fc1.weight"


@pytest.fixture
def weights() -> dict[str, Array]:
    """The tensors of the golden case pre_norm, to be changed."""
    return dict(case("pre_norm").weights)


# --- strict ---------------------------------------------------------------------------------------


def test_a_missing_tensor(backend: Backend, folder: Path, weights: dict[str, Array]) -> None:
    del weights[FC1]
    write(folder, weights, case("pre_norm").config)
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors .*{FC1}"):
        backend.load(folder)
    model, info = backend.load(folder, output_loading_info=True)
    assert info == {
        "missing_keys": [FC1],
        "unexpected_keys": [],
        "mismatched_keys": [],
        "error_msgs": [],
    }
    found = backend.canonical_weights(model)
    drawn = found.pop(FC1)
    assert bits(found) == bits({name: weights[name] for name in found})
    assert 0.01 < drawn.std() < 0.03  # init_std=0.02


def test_an_unexpected_tensor(backend: Backend, folder: Path, weights: dict[str, Array]) -> None:
    weights["model.decoder.layers.7.fc1.bias"] = np.zeros(40, np.float32)
    write(folder, weights, case("pre_norm").config)
    with pytest.raises(CheckpointError, match=r"holds 1 tensors .*model.decoder.layers.7.fc1.bias"):
        backend.load(folder)
    _, info = backend.load(folder, output_loading_info=True)
    assert info["unexpected_keys"] == ["model.decoder.layers.7.fc1.bias"]


def test_a_tensor_of_another_shape(
    backend: Backend, folder: Path, weights: dict[str, Array]
) -> None:
    weights[FC1] = np.zeros((41, 24), np.float32)
    write(folder, weights, case("pre_norm").config)
    message = (
        rf"{FC1}: expected \(40, 24\) from config.json \(ffn_dim=40, hidden_size=24\), "
        r"found \(41, 24\) in model.safetensors"
    )
    with pytest.raises(CheckpointError, match=message):
        backend.load(folder)
    with pytest.raises(CheckpointError, match=message):
        backend.load(folder, output_loading_info=True)
    model, info = backend.load(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert info["mismatched_keys"] == [FC1] and info["missing_keys"] == []
    drawn = backend.canonical_weights(model)[FC1]
    assert drawn.shape == (40, 24) and 0.01 < drawn.std() < 0.03


def test_a_size_that_the_checkpoint_looks_like(backend: Backend, folder: Path) -> None:
    config = case("pre_norm").config.replace(vocab_size=99, num_hidden_layers=0)
    write(folder, {EMBEDDING: np.zeros((50272, 512), np.float16)}, config)
    with pytest.raises(
        CheckpointError, match="The checkpoint looks like opt-350m; check the confi"
    ):
        backend.load(folder)


def test_another_model(backend: Backend, folder: Path) -> None:
    write(folder, {"transformer.wte.weight": np.zeros((4, 4), np.float32)}, OPTConfig())
    with pytest.raises(CheckpointError, match="No OPT checkpoint"):
        backend.load(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="model_type 'opt', found 'gpt2'"):
        backend.load(folder)


@pytest.mark.parametrize("name", ["post_norm", "untied_gelu"])
def test_a_report_of_a_whole_checkpoint_is_empty(backend: Backend, name: str) -> None:
    _, info = backend.load(case(name).folder, output_loading_info=True)
    assert not any(info.values())


# --- options --------------------------------------------------------------------------------------


def test_configuration_overrides(backend: Backend, folder: Path) -> None:
    model = backend.load(folder, dropout=0.25, activation_function="gelu", use_cache=False)
    config = backend.config(model)
    assert (config.dropout, config.activation_function, config.use_cache) == (0.25, "gelu", False)
    ids = np.array([[5, 6, 7]])
    found = backend.forward(model, input_ids=ids)
    assert found.keys() == {"logits", "raw"}
    plain = backend.forward(backend.load(folder), input_ids=ids)
    assert np.abs(found["logits"] - plain["logits"]).max() > 1e-3
    with pytest.raises(InputError, match="no option 'dropuot'.*'dropout'"):
        backend.load(folder, dropuot=0.1)
    with pytest.raises(ConfigError, match="unknown activation 'step'"):
        backend.load(folder, activation_function="step")


def test_a_configuration_of_the_callers_own(backend: Backend, folder: Path) -> None:
    config = case("pre_norm").config.replace(activation_function="gelu")
    found = backend.load(folder, config=config, dropout=0.5)
    assert backend.config(found).activation_function == "gelu"
    assert backend.config(found).dropout == 0.5
    assert config.dropout == 0.1


@pytest.mark.parametrize(
    ("asked", "config_says", "expected"),
    [
        (None, "float16", "float32"),
        ("float16", None, "float16"),
        ("bf16", None, "bfloat16"),
        (ml_dtypes.bfloat16, None, "bfloat16"),
        (np.float16, None, "float16"),
        ("auto", "bfloat16", "bfloat16"),
        ("auto", None, "float32"),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtypes(
    backend: Backend,
    folder: Path,
    weights: dict[str, Array],
    asked: Any,
    config_says: str | None,
    expected: str,
    key: str,
) -> None:
    write(folder, weights, case("pre_norm").config.replace(torch_dtype=config_says))
    model = backend.load(folder, **{key: asked})
    found = backend.canonical_weights(model)
    assert {str(array.dtype) for array in found.values()} == {expected}
    assert backend.config(model).torch_dtype == expected
    exact = {name: weights[name].astype(found[name].dtype) for name in found}
    assert bits(found) == bits(exact)


def test_an_unknown_dtype(backend: Backend, folder: Path) -> None:
    with pytest.raises(InputError, match="Unknown dtype 'int8'"):
        backend.load(folder, dtype="int8")


def test_generation_defaults_come_along(backend: Backend, folder: Path) -> None:
    defaults = {"max_new_tokens": 3, "pad_token_id": 1, "eos_token_id": [2, 5]}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    model = backend.load(folder)
    assert backend.generation_config(model).eos_token_id == (2, 5)
    assert backend.generate(model, np.array([[5, 6]])).shape[1] <= 5
    (folder / "generation_config.json").unlink()
    assert backend.generation_config(backend.load(folder)).eos_token_id == 2


# --- heads ----------------------------------------------------------------------------------------


def test_a_base_model_loads_with_a_tied_head(backend: Backend, folder: Path) -> None:
    golden = case("pre_norm")
    base = {k.removeprefix("model."): v for k, v in golden.weights.items() if k != HEAD}
    write(folder, base, golden.config)
    found = backend.forward(backend.load(folder), **golden.inputs("unpadded"))
    tolerance = TOLERANCES[backend.name, "float32"]
    expected = golden.outputs("unpadded")["logits"]
    assert_close(found["logits"], expected, "tied", tolerance=tolerance)


def test_a_base_model_needs_a_new_untied_head(backend: Backend, folder: Path) -> None:
    golden = case("untied_gelu")
    base = {k.removeprefix("model."): v for k, v in golden.weights.items() if k != HEAD}
    write(folder, base, golden.config)
    with pytest.warns(UserWarning, match=r"has no lm_head\.weight: initialised anew"):
        model = backend.load(folder)
    head = backend.canonical_weights(model)[HEAD]
    assert head.shape == golden.weights[HEAD].shape and 0.015 < head.std() < 0.025
    _, info = backend.load(folder, output_loading_info=True)
    assert info["missing_keys"] == [HEAD]


def test_a_head_is_left_behind_by_the_base_model(backend: Backend) -> None:
    golden = case("untied_gelu")
    model, info = backend.load(golden.folder, architecture="OPTModel", output_loading_info=True)
    assert info["unexpected_keys"] == [HEAD]
    found = backend.canonical_weights(model)
    assert bits(found) == bits({k: v for k, v in golden.weights.items() if k != HEAD})


def test_a_tied_head_that_is_stored_again_is_not_read(
    backend: Backend, folder: Path, weights: dict[str, Array]
) -> None:
    weights[HEAD] = weights[EMBEDDING].copy()
    model, info = backend.load(
        write(folder, weights, case("pre_norm").config), output_loading_info=True
    )
    assert not any(info.values())
    assert HEAD not in backend.canonical_weights(model)
    backend.save(model, folder / "again")
    assert HEAD not in load_file(folder / "again" / "model.safetensors")


@pytest.mark.parametrize("where", ["model", "decoder"])
def test_a_stored_head_that_is_not_the_embedding_is_kept(
    backend: Backend, folder: Path, weights: dict[str, Array], where: str
) -> None:
    """A configuration that says tied, or says nothing, lost the head without a word."""
    weights[HEAD] = weights[EMBEDDING] * 2
    config = case("pre_norm").config
    if where == "decoder":  # as in the first files on the hub
        weights = {name.removeprefix("model."): value for name, value in weights.items()}
    write(folder, weights, config)
    with pytest.warns(UserWarning, match=f"{HEAD} holds other values.*set to False"):
        model = backend.load(folder)
    assert backend.config(model).tie_word_embeddings is False
    assert bits({HEAD: backend.canonical_weights(model)[HEAD]}) == bits({HEAD: weights[HEAD]})
    ids = np.array([[5, 6, 7]])
    config.replace(tie_word_embeddings=False).save_pretrained(folder)
    expected = backend.forward(backend.load(folder), input_ids=ids)["logits"]
    assert np.array_equal(backend.forward(model, input_ids=ids)["logits"], expected)
    backend.save(model, folder / "again")
    written = json.loads((folder / "again" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert bits(load_file(folder / "again" / "model.safetensors"))[HEAD] == bits(weights)[HEAD]


def test_a_stored_head_of_another_shape_is_an_error(
    backend: Backend, folder: Path, weights: dict[str, Array]
) -> None:
    weights[HEAD] = np.zeros((103, 12), np.float32)
    write(folder, weights, case("pre_norm").config)
    with (
        pytest.warns(UserWarning, match="holds other values"),
        pytest.raises(CheckpointError, match=rf"{HEAD}: expected \(103, 24\).*found \(103, 12\)"),
    ):
        backend.load(folder)


def test_a_stored_head_does_not_matter_to_other_classes(
    backend: Backend, folder: Path, weights: dict[str, Array]
) -> None:
    weights[HEAD] = weights[EMBEDDING] * 2
    write(folder, weights, case("pre_norm").config)
    _, info = backend.load(folder, architecture="OPTModel", output_loading_info=True)
    assert info["unexpected_keys"] == [HEAD]


# --- files that change ----------------------------------------------------------------------------


def test_a_file_that_is_rewritten_while_it_is_read(
    backend: Backend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cp or torch.save do, halfway through: an error, and no mixture of two models."""
    file, read = folder / "model.safetensors", LazyTensor.read_stored

    def reading(tensor: LazyTensor) -> Array:
        found = read(tensor)
        file.write_bytes(file.read_bytes()[:-100] + bytes(100))
        os.utime(file, ns=(1, 1))  # clocks of file systems tick every few milliseconds
        return found

    monkeypatch.setattr(LazyTensor, "read_stored", reading)
    with pytest.raises(CheckpointError, match=r"model.safetensors: .* changed while it was read"):
        backend.load(folder)


def test_what_is_loaded_no_longer_needs_its_file(backend: Backend, folder: Path) -> None:
    """Rewritten in place afterwards, as by a training that saves there again and again."""
    model = backend.load(folder)
    ids = np.array([[5, 6, 7]])
    expected = backend.forward(model, input_ids=ids)["logits"]
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.seek(size // 2)
        opened.write(bytes(size - size // 2))
    assert np.array_equal(backend.forward(model, input_ids=ids)["logits"], expected)


def test_only_torch_can_leave_weights_in_their_file(backend: Backend, folder: Path) -> None:
    backend.load(folder, mmap=False)
    if backend.name == "torch":
        backend.load(folder, mmap=True)
    else:
        with pytest.raises(InputError, match="mmap=True: expected a model of PyTorch"):
            backend.load(folder, mmap=True)


def test_two_dtypes_that_differ(backend: Backend, folder: Path) -> None:
    with pytest.raises(InputError, match="dtype='float32' and torch_dtype='float16' differ"):
        backend.load(folder, dtype="float32", torch_dtype="float16")
