# SPDX-License-Identifier: Apache-2.0
"""The files that transformers writes, and all that we write: the same model each time."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from metaseq_files import write_shards

from conversion import convert
from opt_core import FormatError
from opt_core.formats import FORMATS
from tests.backends.base import Backend
from tests.cases import GOLDEN, MODELS, bits
from tests.tolerances import TOLERANCES, assert_close

#: folder -> which logits of expected.npz
READABLE = {
    "safetensors": "logits",
    "safetensors_sharded": "logits",
    "safetensors_base": "logits",
    "safetensors_untied": "untied/logits",
    "bin": "logits",
    "bin_sharded": "logits",
    "bin_legacy": "logits",
    "bin_fp16_decoder": "float16/logits",
    "bin_bf16": "bfloat16/logits",
    "tf_safetensors": "logits",
    "flax_safetensors": "logits",
    "flax_safetensors_base": "logits",
    "flax_safetensors_untied": "untied/logits",
    "h5": "logits",
    "h5_sharded": "logits",
    "msgpack": "logits",
    "msgpack_sharded": "logits",
    "msgpack_untied": "untied/logits",
}


@pytest.mark.parametrize("model", MODELS)
def test_no_folder_is_forgotten(model: str) -> None:
    folders = {path.name for path in (GOLDEN / "formats" / model).iterdir() if path.is_dir()}
    assert folders == READABLE.keys()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("folder", READABLE)
def test_every_format_gives_the_same_logits(backend: Backend, model: str, folder: str) -> None:
    files = GOLDEN / "formats" / model
    with np.load(files / "expected.npz") as file:
        expected = dict(file)
    mask = expected["attention_mask"]
    loaded = backend.load(files / folder)
    found = backend.forward(loaded, input_ids=expected["input_ids"], attention_mask=mask)
    assert {array.dtype for array in backend.canonical_weights(loaded).values()} == {
        np.dtype(np.float32)
    }
    assert_close(
        found["logits"][mask == 1],
        expected[READABLE[folder]][mask == 1],
        f"{model}/{folder}",
        tolerance=TOLERANCES[backend.name, "float32"],
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_that_we_write_is_read(
    backend: Backend, model: str, name: str, tmp_path: Path
) -> None:
    source = GOLDEN / "formats" / model / "safetensors_untied"
    size = "5KB" if model == "post_norm" else "5GB"
    convert(source, tmp_path, to=name, max_shard_size=size)
    found = backend.canonical_weights(backend.load(tmp_path))
    assert bits(found) == bits(backend.canonical_weights(backend.load(source)))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("configured", [False, True])
def test_metaseq(backend: Backend, model: str, configured: bool, tmp_path: Path) -> None:
    """Three FSDP shards; without a config.json, what the training run recorded must do."""
    source = GOLDEN / "formats" / model / "safetensors"
    expected = backend.canonical_weights(backend.load(source))
    settings = {
        "decoder_attention_heads": 2,
        "activation_fn": "relu",
        "decoder_normalize_before": model == "pre_norm",
    }
    write_shards(tmp_path, expected, 3, settings=settings)
    if configured:
        shutil.copy(source / "config.json", tmp_path)
    loaded = backend.load(tmp_path)
    assert bits(backend.canonical_weights(loaded)) == bits(expected)
    assert loaded.config.num_attention_heads == 2


def test_hints_choose_among_several(backend: Backend, tmp_path: Path) -> None:
    for model, name in (("pre_norm", "bin"), ("pre_norm", "h5"), ("pre_norm", "msgpack")):
        shutil.copytree(GOLDEN / "formats" / model / name, tmp_path, dirs_exist_ok=True)
    hints = {
        "from_pt": ("flax_model.msgpack", "tf_model.h5"),
        "from_tf": ("flax_model.msgpack", "pytorch_model.bin"),
        "from_flax": ("tf_model.h5", "pytorch_model.bin"),
    }
    for hint, damaged in hints.items():
        folder = shutil.copytree(tmp_path, tmp_path / hint, ignore=lambda *_: hints)
        for name in damaged:
            (folder / name).write_bytes(b"not what is asked for")
        backend.load(folder, **{hint: True})
        with pytest.raises(FormatError):
            backend.load(folder, **{next(other for other in hints if other != hint): True})
