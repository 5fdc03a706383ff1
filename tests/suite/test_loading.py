# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained` and `save_pretrained`: strict about every tensor, and exact."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opt_core import CheckpointError, ConfigError, FormatError, HubError, InputError, OPTConfig
from tests.backends.base import Array, Backend
from tests.cases import CASES, GOLDEN, case
from tests.tolerances import TOLERANCES, assert_close

HEAD, EMBEDDING = "lm_head.weight", "model.decoder.embed_tokens.weight"
FC1 = "model.decoder.layers.1.fc1.weight"


def write(folder: Path, weights: dict[str, Array], config: OPTConfig) -> Path:
    """A checkpoint of these tensors."""
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    return folder


def bits(weights: dict[str, Array]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Arrays for an exact comparison."""
    return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in weights.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden case pre_norm."""
    return Path(shutil.copytree(case("pre_norm").folder, tmp_path / "model"))


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
    model, info = backend.load(golden.folder, base=True, output_loading_info=True)
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


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("base", [False, True], ids=["causal", "base"])
def test_save_and_load_are_exact(backend: Backend, tmp_path: Path, name: str, base: bool) -> None:
    model = backend.load(case(name).folder, base=base)
    before = backend.canonical_weights(model)
    backend.save(model, tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert bits(load_file(tmp_path / "model.safetensors")) == bits(before)
    assert bits(backend.canonical_weights(backend.load(tmp_path, base=base))) == bits(before)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["OPTModel" if base else "OPTForCausalLM"]
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


# --- files that lie, and places without one -------------------------------------------------------


def test_a_truncated_file(backend: Backend, folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for length in (0, 4, 100, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            backend.load(folder)


def test_a_header_that_lies(backend: Backend, folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[FC1]["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(FormatError, match=FC1):
        backend.load(folder)
    file.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        backend.load(folder)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_bin_that_asks_for_a_command(backend: Backend, folder: Path, kind: str) -> None:
    """Unpickling it as PyTorch once did would run the command."""
    (folder / "model.safetensors").unlink()
    ran, file = folder / "ran", folder / "pytorch_model.bin"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {ran}",)

    state = pickle.dumps({"x": Evil()}, 2)
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", state)
            archive.writestr("archive/version", "3\n")
    else:
        start = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
        parts = [pickle.dumps(value, 2) for value in start]
        file.write_bytes(b"".join([*parts, state, pickle.dumps([], 2)]))
    with pytest.raises(FormatError, match=rf"{os.name}\W+system"):
        backend.load(folder)
    assert not ran.exists()


def test_an_index_that_points_outside(backend: Backend, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {EMBEDDING: "../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"plain name of a file .*\.\./\.\./etc/passwd"):
        backend.load(folder)


def test_an_index_whose_shard_is_missing(backend: Backend, folder: Path) -> None:
    shutil.copytree(
        GOLDEN / "formats" / "pre_norm" / "safetensors_sharded", folder, dirs_exist_ok=True
    )
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-00003\.safetensors beside the index"):
        backend.load(folder)


def test_a_directory_without_weights_or_config(backend: Backend, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        backend.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        backend.load(folder)


def test_no_such_directory(backend: Backend, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="nowhere"):
        backend.load(tmp_path / "nowhere")


@pytest.mark.parametrize("how", ["offline", "unreachable"])
def test_no_network(backend: Backend, tmp_path: Path, how: str) -> None:
    """A name that is neither cached nor reachable: an error that says so, soon."""
    environment = {
        "offline": {"HF_HUB_OFFLINE": "1"},
        "unreachable": {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
    }[how]
    code = (
        f"from tests.backends.{backend.name} import BACKEND\n"
        "from opt_core import HubError\n"
        "try:\n"
        "    BACKEND.load('facebook/opt-125m')\n"
        "except HubError as error:\n"
        "    print('HubError:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=GOLDEN.parents[1],
        env={**os.environ, **environment, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith("HubError: "), done.stderr
    assert "facebook/opt-125m" in done.stdout
