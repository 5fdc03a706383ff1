# SPDX-License-Identifier: Apache-2.0
"""A checkpoint held against the table: every spelling is found, everything else is reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from opt_core import CheckpointError, InputError, OPTConfig
from opt_core.checkpoints import CheckpointReader
from opt_core.dialects import DIALECTS, recognise
from opt_core.dtypes import dtype_name
from opt_core.loading import LoadReport, match, resolve_dtype
from opt_core.params import FRAMEWORKS, param_table

Arrays = dict[str, NDArray[Any]]

CONFIG = OPTConfig(
    vocab_size=10,
    hidden_size=8,
    word_embed_proj_dim=6,
    num_attention_heads=2,
    num_hidden_layers=2,
    ffn_dim=12,
    max_position_embeddings=5,
)
EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"


def values(config: OPTConfig = CONFIG, architecture: str = "OPTForCausalLM") -> Arrays:
    """Canonical tensors, each other than the rest."""
    rng = np.random.default_rng(0)
    table = param_table(config, architecture)
    return {p.name: rng.standard_normal(p.shape).astype(np.float32) for p in table}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """Writes tensors to a file and opens it."""
    readers = []

    def open_(arrays: Arrays) -> CheckpointReader:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(contiguous, tmp_path / "model.safetensors")
        readers.append(CheckpointReader.open(tmp_path))
        return readers[-1]

    yield open_
    for reader in readers:
        reader.close()


def foreign(dialect: Any, choice: int, config: OPTConfig = CONFIG) -> Arrays:
    """The tensors in a dialect; `choice` picks one of the spellings of each name."""
    arrays = values(config)
    found: Arrays = {}
    for param in param_table(config):
        names = dialect.spellings(param)
        array = arrays[param.name]
        found[names[choice % len(names)]] = array.T if dialect.transposed(param) else array
    return found


@pytest.mark.parametrize("choice", [0, 1])
@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_dialect_into_every_framework(
    opened: Any, dialect: Any, choice: int, framework: str
) -> None:
    """Choice 1 is the name without the leading `model`."""
    sources, report = match(CONFIG, "OPTForCausalLM", opened(foreign(dialect, choice)))
    assert report == LoadReport()
    expected = values()
    assert sources.keys() == expected.keys()
    for name, source in sources.items():
        array = expected[name].T if source.param.transposed(framework) else expected[name]
        for found in (source.read(framework), source.map(framework)):
            np.testing.assert_array_equal(found, array)
        assert source.read(framework).flags.c_contiguous and source.read(framework).flags.writeable
        assert source.shape == expected[name].shape


def test_names_in_files_of_a_bare_base_model() -> None:
    """Flax's and Keras' models of that class have no `model` in their trees; in the other files it
    does no harm, and other tools ask for it.
    """
    fc1 = next(param for param in param_table(CONFIG) if param.module.endswith("layers.1.fc1"))
    names = {
        "pt": "model.decoder.layers.1.fc1.weight",
        "tf": "model/decoder/layers.1/fc1/kernel:0",
        "flax": "model.decoder.layers.1.fc1.kernel",
        "keras": "layers/tfopt_model/decoder/layers/opt_decoder_layer_1/fc1/vars/0",
    }
    bare = {
        "pt": names["pt"],
        "tf": names["tf"],
        "flax": "decoder.layers.1.fc1.kernel",
        "keras": "decoder/layers/opt_decoder_layer_1/fc1/vars/0",
    }
    assert {key: d.name(fc1, "OPTForCausalLM") for key, d in DIALECTS.items()} == names
    assert {key: d.name(fc1, "OPTModel") for key, d in DIALECTS.items()} == bare


def test_flax_parameters_saved_with_their_collection(opened: Any) -> None:
    """People save `{"params": params}`, as `Module.init` returns them."""
    arrays = {f"params.{name}": array for name, array in foreign(DIALECTS["flax"], 0).items()}
    sources, report = match(CONFIG, "OPTForCausalLM", opened(arrays))
    assert report == LoadReport() and sources.keys() == values().keys()


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_no_two_parameters_share_a_spelling(dialect: Any) -> None:
    config = CONFIG.replace(tie_word_embeddings=False)
    names = [name for param in param_table(config) for name in dialect.spellings(param)]
    assert len(names) == len(set(names))


def test_names_of_the_first_conversions(opened: Any) -> None:
    """Before transformers had OPT, its projections and its last norm had metaseq's names."""
    config = CONFIG.replace(word_embed_proj_dim=6)
    old = {
        "model.decoder.project_in.weight": "decoder.project_in_dim.weight",
        "model.decoder.project_out.weight": "decoder.project_out_dim.weight",
        "model.decoder.final_layer_norm.weight": "decoder.layer_norm.weight",
        "model.decoder.final_layer_norm.bias": "decoder.layer_norm.bias",
    }
    arrays = {old.get(name, name.removeprefix("model.")): a for name, a in values(config).items()}
    arrays["decoder.version"] = np.array([3.0], np.float32)
    arrays["decoder.output_projection.weight"] = arrays["decoder.embed_tokens.weight"]
    sources, report = match(config, "OPTForCausalLM", opened(arrays))
    assert report == LoadReport() and len(sources) == len(values(config))


def test_older_names_of_tensorflow_tables(opened: Any) -> None:
    positions = param_table(CONFIG)[1]
    assert positions.name.endswith("embed_positions.weight")
    names = DIALECTS["tf"].spellings(positions)
    assert "model/decoder/embed_positions/embeddings:0" in names
    assert "model/decoder/embed_positions/weight:0" in names


def test_a_name_that_is_stored_twice(opened: Any) -> None:
    arrays = values()
    arrays[EMBEDDING.removeprefix("model.")] = arrays[EMBEDDING]
    with pytest.raises(CheckpointError, match=f"{EMBEDDING} is stored 2 times"):
        match(CONFIG, "OPTForCausalLM", opened(arrays))


def test_not_an_opt_checkpoint() -> None:
    with pytest.raises(CheckpointError, match=r"No OPT checkpoint: .*found \['a', 'b'\]"):
        recognise(["b", "a"], param_table(CONFIG)[0])
    with pytest.raises(CheckpointError, match="found no tensors"):
        recognise([], param_table(CONFIG)[0])


def test_what_is_missing_unexpected_and_of_another_head(opened: Any) -> None:
    arrays = values(CONFIG.replace(num_hidden_layers=3))
    del arrays["model.decoder.layers.0.fc2.bias"]
    arrays["score.weight"] = np.zeros((2, 6), np.float32)
    arrays[HEAD] = arrays[EMBEDDING]  # the tied head once more: neither read nor reported
    sources, report = match(CONFIG, "OPTForCausalLM", opened(arrays))
    assert report.missing == ("model.decoder.layers.0.fc2.bias",)
    assert report.missing_head == ()
    assert report.other_heads == ("score.weight",)
    assert len(report.unexpected) == 16
    assert all(name.startswith("model.decoder.layers.2.") for name in report.unexpected)
    assert HEAD not in sources
    info = report.loading_info()
    assert info["missing_keys"] == list(report.missing)
    assert info["unexpected_keys"] == [*report.unexpected, "score.weight"]


def check(report: LoadReport, **options: bool) -> None:
    report.check(where="here", **options)


def test_what_a_report_says() -> None:
    check(LoadReport(other_heads=("score.weight",)))
    with pytest.raises(CheckpointError, match="here lacks 1 tensors .*: a. Is a shard missing"):
        check(LoadReport(missing=("a",)))
    with pytest.raises(CheckpointError, match="here holds 1 tensors .* no place for: b"):
        check(LoadReport(unexpected=("b",)))
    with pytest.raises(CheckpointError, match="here does not fit the configuration:\n  c"):
        check(LoadReport(mismatched=("c",)), tolerate=True)
    with pytest.warns(UserWarning, match="here has no score.weight: initialised anew"):
        LoadReport(missing_head=("score.weight",)).warn_of_new_head("here")
    check(LoadReport(missing_head=("score.weight",)))
    tolerated = LoadReport(missing=("a",), missing_head=("h",), unexpected=("b",))
    check(tolerated, tolerate=True)
    check(LoadReport(mismatched=("c",)), ignore_mismatched_sizes=True)


def test_a_long_report_is_shortened() -> None:
    names = tuple(f"name{i}" for i in range(100))
    with pytest.raises(CheckpointError, match="lacks 100 tensors .*name7, and 92 more") as error:
        check(LoadReport(missing=names))
    assert "name8" not in str(error.value)


# --- dtypes ---------------------------------------------------------------------------------------


def test_the_dtype_to_load_in(opened: Any) -> None:
    arrays = {name: array.astype(np.float16) for name, array in values().items()}
    reader = opened(arrays)
    assert resolve_dtype(None, CONFIG, reader) == "float32"
    assert resolve_dtype("auto", CONFIG, reader) == "float16"
    assert resolve_dtype("auto", CONFIG.replace(torch_dtype="bfloat16"), reader) == "bfloat16"
    assert resolve_dtype("bf16", CONFIG, reader) == "bfloat16"
    assert resolve_dtype(np.float64, CONFIG, reader) == "float64"


@pytest.mark.parametrize("dtype", ["int8", "float8", np.int32, 3, bool])
def test_unknown_dtypes(dtype: Any) -> None:
    with pytest.raises(InputError, match="Unknown dtype .* float32, float16, bfloat16"):
        dtype_name(dtype)


def test_a_head_that_metaseq_s_name_repeats(opened: Any) -> None:
    """`output_projection` is the head only where nothing else is."""
    config = CONFIG.replace(tie_word_embeddings=False)
    arrays = values(config)
    older = "decoder.output_projection.weight"
    arrays[older] = arrays[HEAD] + 1
    sources, report = match(config, "OPTForCausalLM", opened(arrays))
    assert sources[HEAD].tensor.name == HEAD and report == LoadReport()
    del arrays[HEAD]
    sources, report = match(config, "OPTForCausalLM", opened(arrays))
    assert sources[HEAD].tensor.name == older and report == LoadReport()
