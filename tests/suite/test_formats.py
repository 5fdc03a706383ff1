# SPDX-License-Identifier: Apache-2.0
"""The files that transformers writes, in every layout that we read: the same model each time."""

from __future__ import annotations

import numpy as np
import pytest

from tests.backends.base import Backend
from tests.cases import GOLDEN, MODELS
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
