# SPDX-License-Identifier: Apache-2.0
"""What a conversion must not do silently; each was once done, and found by trying."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import read
from safetensors.numpy import load_file, save_file

from conversion import compare, convert, plan
from opt_core import CheckpointError, FormatError, InputError, OPTConfig
from opt_core.assets import TINY_SUMS
from opt_core.checkpoints import CheckpointReader
from opt_core.formats import FORMATS
from opt_core.params import param_table
from opt_core.staging import PARTIAL

FORMATS_FOLDER = Path(__file__).parents[1] / "golden" / "formats"
PRE_NORM = FORMATS_FOLDER / "pre_norm" / "safetensors"
FC1 = "model.decoder.layers.1.fc1.weight"
EMBEDDING = "model.decoder.embed_tokens.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of a golden checkpoint that a test may change."""
    return shutil.copytree(PRE_NORM, tmp_path / "source")


def change(folder: Path, **tensors: Any) -> None:
    """Adds or replaces tensors; "__" stands for "."."""
    arrays = load_file(folder / "model.safetensors")
    arrays |= {name.replace("__", "."): array for name, array in tensors.items()}
    save_file(arrays, folder / "model.safetensors")


def declare(folder: Path, **fields: Any) -> None:
    """Changes fields of a configuration."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("companion", [np.inf, np.nan, 0.0])
def test_no_number_becomes_an_infinity(source: Path, tmp_path: Path, companion: float) -> None:
    """One infinity that was there before hid all that were made."""
    weight = load_file(source / "model.safetensors")[FC1]
    weight[0, :2] = companion, 1e30
    change(source, **{FC1: weight})
    with pytest.raises(CheckpointError, match=r"float16 can hold, found one of 1e\+30"):
        convert(source, tmp_path / "out", dtype="float16")
    weight[0, 1] = 1
    change(source, **{FC1: weight})
    convert(source, tmp_path / "out", dtype="float16", verify=True)
    found = read(tmp_path / "out")[FC1]
    np.testing.assert_array_equal(found, weight.astype(np.float16))


def test_a_tied_head_that_is_another(source: Path, tmp_path: Path) -> None:
    embedding = load_file(source / "model.safetensors")[EMBEDDING]
    change(source, lm_head__weight=embedding.copy())
    convert(source, tmp_path / "same")
    change(source, lm_head__weight=embedding + 1)
    with pytest.raises(CheckpointError, match="lm_head.weight to be the embedding again"):
        convert(source, tmp_path / "out")
    declare(source, tie_word_embeddings=False)
    convert(source, tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out")["lm_head.weight"], embedding + 1)


def test_metaseq_s_name_of_a_head_of_its_own(source: Path, tmp_path: Path) -> None:
    head = load_file(source / "model.safetensors")[EMBEDDING] + 1
    change(source, decoder__output_projection__weight=head)
    with pytest.raises(CheckpointError, match="to be the embedding again"):
        convert(source, tmp_path / "out")
    declare(source, tie_word_embeddings=False)
    convert(source, tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out")["lm_head.weight"], head)


def test_integers_are_no_weights(source: Path, tmp_path: Path) -> None:
    change(source, **{FC1: np.ones((24, 16), np.int8)})
    with pytest.raises(CheckpointError, match=r"fc1.weight: expected floating-point .* found int8"):
        convert(source, tmp_path / "out")


# --- heads under one name -------------------------------------------------------------------------


def write_model(folder: Path, architecture: str) -> Path:
    """A checkpoint of any class of model."""
    config = OPTConfig.from_json_file(PRE_NORM / "config.json", architectures=[architecture])
    rng = np.random.default_rng(0)
    arrays = {
        p.name: rng.standard_normal(p.shape).astype(np.float32)
        for p in param_table(config, architecture)
    }
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors")
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "architecture", ["OPTModel", "OPTForSequenceClassification", "OPTForQuestionAnswering"]
)
def test_every_class_in_every_format(architecture: str, name: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", architecture)
    done = convert(source, tmp_path / "there", to=name, verify=True)
    assert not done.plan.missing and not done.plan.dropped
    assert compare(source, tmp_path / "there").equal
    convert(tmp_path / "there", tmp_path / "back")
    expected, found = read(source), read(tmp_path / "back")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("name", FORMATS)
def test_one_class_s_head_is_not_another_s(name: str, tmp_path: Path) -> None:
    """Keras spells the heads of all classes alike."""
    source = write_model(tmp_path / "source", "OPTForQuestionAnswering")
    convert(source, tmp_path / "there", to=name)
    done = convert(
        tmp_path / "there", tmp_path / "out", architecture="OPTForSequenceClassification"
    )
    assert done.plan.missing == ("score.weight",)
    assert len(done.plan.dropped) == 2
    assert not {"score.weight", "qa_outputs.weight"} & read(tmp_path / "out").keys()


# --- what is in the target ------------------------------------------------------------------------


def test_weights_of_other_formats_go(source: Path, tmp_path: Path) -> None:
    """They would be read instead, by a hint or by others."""
    for name in ("msgpack", "orbax", "h5", "safetensors"):
        convert(source, tmp_path / "out", to=name, overwrite=True)
        with CheckpointReader.open(tmp_path / "out") as reader:
            assert len(reader) == 52
        assert (
            len(list((tmp_path / "out").iterdir()))
            == 2 + (source / "generation_config.json").exists()
        )


def test_a_tokenizer_stays_where_the_source_has_none(tmp_path: Path) -> None:
    convert(TINY_SUMS, tmp_path / "out", to="orbax")
    before = (tmp_path / "out" / "tokenizer.json").read_bytes()
    config = tmp_path / "out" / "config.json"
    convert(tmp_path / "out" / "orbax", tmp_path / "out", config=config, overwrite=True)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before
    assert not (tmp_path / "out" / "orbax").exists()
    assert compare(TINY_SUMS, tmp_path / "out").equal


def test_a_target_with_nothing_but_what_a_dead_try_left(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / PARTIAL).mkdir(parents=True)
    convert(source, tmp_path / "out")
    assert PARTIAL not in {path.name for path in (tmp_path / "out").iterdir()}


def test_a_link_to_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="found a link to nothing"):
        convert(source, tmp_path / "out")


def test_a_text_that_is_a_link_to_elsewhere(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(FormatError, match="found a link to"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- resuming -------------------------------------------------------------------------------------


class StoppedError(Exception):
    """Ends a conversion in the midst of it."""


def stop_late(done: int, total: int) -> None:
    if done > 0.7 * total:
        raise StoppedError


def test_resuming_with_another_size_of_shards(source: Path, tmp_path: Path) -> None:
    """Two sizes that give as many shards: a broken checkpoint was reported as a success."""
    sizes = (15100, 15300)
    first, second = (plan(source, max_shard_size=size).files_written for size in sizes)
    assert first == second
    with pytest.raises(StoppedError):
        convert(source, tmp_path / "out", max_shard_size=sizes[0], resume=True, progress=stop_late)
    convert(source, tmp_path / "out", max_shard_size=sizes[1], resume=True)
    assert compare(source, tmp_path / "out").equal


def test_resuming_with_a_damaged_shard(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        convert(source, tmp_path / "out", max_shard_size=9000, resume=True, progress=stop_late)
    left = tmp_path / f".out{PARTIAL}"
    (left / "model-00001-of-00004.safetensors").write_bytes(b"junk")
    convert(source, tmp_path / "out", max_shard_size=9000, resume=True)
    assert compare(source, tmp_path / "out").equal


# --- comparing ------------------------------------------------------------------------------------


def test_other_shapes_are_a_difference(tmp_path: Path) -> None:
    found = compare(PRE_NORM, FORMATS_FOLDER / "post_norm" / "safetensors")
    assert not found.equal and found.only_first and found.only_second
    (embedding,) = (t for t in found.tensors if t.name == EMBEDDING)
    assert embedding.shapes == ((71, 16), (71, 12)) and np.isnan(embedding.difference)


def test_no_number_is_equal_to_itself_only_in_its_bits(source: Path, tmp_path: Path) -> None:
    weight = load_file(source / "model.safetensors")[FC1]
    weight[0, :3] = np.nan, np.inf, -np.inf
    change(source, **{FC1: weight})
    other = shutil.copytree(source, tmp_path / "other")
    assert compare(source, other).equal
    weight[1, 1] += 0.5
    change(other, **{FC1: weight})
    found = compare(source, other)
    (tensor,) = (t for t in found.tensors if not t.equal)
    assert tensor.difference == pytest.approx(0.5)
