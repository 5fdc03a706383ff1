# SPDX-License-Identifier: Apache-2.0
"""Keras' own weight files, both ways: what `save_weights` writes we read, what we write it loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import OPTConfig
from opt_core.checkpoints import CheckpointIndex, LazyTensor, TensorInfo
from opt_core.checkpoints.hdf5_format import read_hdf5
from opt_core.checkpoints.hdf5_writer import create_keras_hdf5, keras_index_key
from opt_core.checkpoints.sources import FileSource
from opt_core.dialects import DIALECTS
from opt_core.dtypes import MODEL_DTYPES
from opt_core.loading import LoadReport, match
from opt_core.params import param_table
from opt_tf import TFOPTForCausalLM, TFOPTModel
from opt_tf.weights import find_parameter, to_numpy

#: Keras 3.15 turns its variables into arrays in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept")

PRE_NORM = OPTConfig(
    vocab_size=71,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    ffn_dim=24,
    max_position_embeddings=16,
)
POST_NORM = PRE_NORM.replace(word_embed_proj_dim=12, do_layer_norm_before=False)
MODELS = {
    "tied": (TFOPTForCausalLM, PRE_NORM),
    "untied": (TFOPTForCausalLM, POST_NORM.replace(tie_word_embeddings=False)),
    "base": (TFOPTModel, POST_NORM),
    "no biases": (TFOPTForCausalLM, PRE_NORM.replace(enable_bias=False)),
}
SEEDS = "decoder/vars/0"  # the state of dropout's seeds: no parameter
SHARD = 5000  # bytes; Keras asks for room for the largest tensor
#: Bits are written alike whatever they mean: bfloat16 of one model, and of all where there is time.
every_model = pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, "float32") for kind in MODELS),
        ("tied", "bfloat16"),
        *(pytest.param(k, "bfloat16", marks=pytest.mark.slow) for k in MODELS if k != "tied"),
    ],
)


def make(kind: str, dtype: str, seed: int) -> Any:
    """A model in which every parameter is random."""
    cls, config = MODELS[kind]
    model = cls(config, dtype=dtype)
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.standard_normal(weight.shape))
    return model


def parameters(model: Any) -> dict[str, np.ndarray]:
    """Canonical name -> values in canonical layout."""
    values = {}
    for param in param_table(model.config, model.architecture):
        layer, leaf = find_parameter(model, param, model.architecture)
        values[param.name] = to_numpy(getattr(layer, leaf), param.transposed("tf"))
    return values


def assert_same(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype and array.shape == right[name].shape, name
        assert array.tobytes() == right[name].tobytes(), name


def read(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a file, or of all that an index names."""
    index = CheckpointIndex.read(file) if file.suffix == ".json" else None
    tensors = {
        tensor.name: tensor
        for shard in (index.shards if index else (file,))
        for tensor in read_hdf5(FileSource(shard))[0]
    }
    if index:
        index.check({name: tensor.info.file.name for name, tensor in tensors.items()})
    return tensors


def write(folder: Path, model: Any, limit: int) -> Path:
    """Write a model's parameters in shards, whose ends fall between kernel and bias too."""
    dialect, arch = DIALECTS["keras"], model.architecture
    arrays, values = {}, parameters(model)
    for param in param_table(model.config, arch):
        array = values[param.name]
        arrays[dialect.name(param, arch)] = array.T if dialect.transposed(param) else array
    groups: list[dict[str, np.ndarray]] = [{}]
    for name, array in arrays.items():
        if groups[-1] and sum(a.nbytes for a in groups[-1].values()) + array.nbytes > limit:
            groups.append({})
        groups[-1][name] = array
    single = len(groups) == 1
    places: list[tuple[str, str]] = []
    for number, group in enumerate(groups):
        file = folder / ("model.weights.h5" if single else f"model_{number:05d}.weights.h5")
        infos = [TensorInfo(name, array.dtype, array.shape, file) for name, array in group.items()]
        writing = create_keras_hdf5(file, infos, {})
        for name, array in group.items():
            writing.write(name, [array])
        writing.finish()
        places += [(keras_index_key(name), file.name) for name in group]
    if single:
        return folder / "model.weights.h5"
    index = CheckpointIndex.build(folder / "model.weights.json", places, 0)
    index.file.write_text(index.to_json())
    return index.file


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@every_model
def test_what_keras_saves(tmp_path: Path, kind: str, dtype: str, sharded: bool) -> None:
    model = make(kind, dtype, 0)
    if sharded:
        file = tmp_path / "model.weights.json"
        model.save_weights(file, max_shard_size=SHARD / 2**30)
        assert (tmp_path / "model_00001.weights.h5").exists()
    else:
        file = tmp_path / "model.weights.h5"
        model.save_weights(file)
    sources, report = match(model.config, model.architecture, read(file))
    assert report == LoadReport()
    found = {name: source.read("torch") for name, source in sources.items()}
    assert_same(found, parameters(model))
    assert {array.dtype for array in found.values()} == {MODEL_DTYPES[dtype]}


@pytest.mark.parametrize("limit", [10**9, SHARD, 1], ids=["single", "shards", "each its own"])
@every_model
def test_what_keras_loads(tmp_path: Path, kind: str, dtype: str, limit: int) -> None:
    model, other = make(kind, dtype, 0), make(kind, dtype, 1)
    file = write(tmp_path, model, limit)
    other.load_weights(file)
    assert_same(parameters(other), parameters(model))
    sources, report = match(model.config, model.architecture, read(file))
    assert report == LoadReport() and sources.keys() == parameters(model).keys()


def test_shards_end_between_kernel_and_bias(tmp_path: Path) -> None:
    file = write(tmp_path, make("tied", "float32", 0), SHARD)
    files = json.loads(file.read_text())["weight_map"].values()
    assert any(isinstance(names, list) and len(names) == 2 for names in files)


def test_the_names_are_those_of_keras(tmp_path: Path) -> None:
    for kind in MODELS:
        model = make(kind, "float32", 0)
        model.save_weights(tmp_path / "model.weights.h5")
        arch = model.architecture
        table = param_table(model.config, arch)
        names = {DIALECTS["keras"].name(param, arch) for param in table}
        found = read(tmp_path / "model.weights.h5").keys()
        assert names == {name for name in found if not name.endswith(SEEDS)}, kind


def test_a_base_file_holds_what_a_causal_model_needs(tmp_path: Path) -> None:
    base = make("base", "float32", 0)
    base.save_weights(tmp_path / "model.weights.h5")
    tensors = read(tmp_path / "model.weights.h5")
    sources, report = match(base.config, "OPTForCausalLM", tensors)
    assert report == LoadReport() and len(sources) == len(tensors) - len([SEEDS])


def test_moments_and_seeds_are_no_parameters(tmp_path: Path) -> None:
    """They stand in a file that is saved after a training."""
    model = make("tied", "float32", 0)
    model.compile(optimizer="adam", run_eagerly=True)
    ids = np.full((2, 3), 5)
    model.fit(ids, ids, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    tensors = read(tmp_path / "model.weights.h5")
    assert any(name.startswith("optimizer/") for name in tensors)
    sources, report = match(model.config, model.architecture, tensors)
    assert report == LoadReport()
    found = {name: source.read("torch") for name, source in sources.items()}
    assert_same(found, parameters(model))
