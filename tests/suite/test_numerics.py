# SPDX-License-Identifier: Apache-2.0
"""16-bit formats: nothing overflows, and no error is larger than the reference's own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.backends.base import Array, Backend
from tests.cases import CASES, PADDINGS, case
from tests.reference.model import forward
from tests.tolerances import TOLERANCES

pytestmark = pytest.mark.filterwarnings("ignore:attn_implementation=")

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@cache
def truth(name: str, situation: str, dtype: str) -> Array:
    """The logits of the weights as the dtype holds them, in float64."""
    golden = case(name)
    weights = {key: array.astype(DTYPES[dtype]) for key, array in golden.weights.items()}
    return forward(golden.config, weights, **golden.inputs(situation))["logits"]


@every_dtype
def test_no_further_from_the_truth_than_the_reference(backend: Backend, dtype: str) -> None:
    """Root mean square error in every case; the largest error on average over the cases.

    A largest error is a single draw of rounding luck; of 18 cases, it differs from the reference's
    by up to a factor of 1.6 either way where the sums are only taken in another order.
    """
    allowed = TOLERANCES[backend.name, dtype]
    for kernel in backend.kernels:
        largest = []
        for name in CASES:
            golden = case(name)
            model = backend.load(golden.folder, dtype=dtype, attn_implementation=kernel)
            for situation in ("unpadded", "left"):
                real, exact = golden.real(situation), truth(name, situation, dtype)
                found = backend.forward(model, **golden.inputs(situation))["logits"]
                theirs = golden.arrays[f"{situation}/{dtype}/logits"]
                ours, reference = ((x - exact)[real] for x in (found, theirs))
                ratio = np.sqrt(np.mean(ours**2) / np.mean(reference**2))
                assert ratio <= allowed, f"{name} {situation} {kernel}: {ratio:.2f}"
                largest.append(np.abs(ours).max() / np.abs(reference).max())
        average = np.exp(np.mean(np.log(largest)))
        assert average <= allowed, f"{kernel}: largest errors {average:.2f} of the reference's"


@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_weights_and_outputs_have_the_dtype(backend: Backend, dtype: str, name: str) -> None:
    """No layer falls back to float32: not the projections of opt-350m, not the norms."""
    golden = case(name)
    model = backend.load(golden.folder, dtype=dtype)
    weights = backend.canonical_weights(model)
    assert {array.dtype for array in weights.values()} == {DTYPES[dtype]}
    flags = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    raw = backend.forward(model, **golden.inputs("left"), **flags)["raw"]
    values = [raw["logits"], *raw["hidden_states"], *raw["attentions"]]
    values += [part for pair in raw["past_key_values"] for part in pair]
    assert {dtype in str(value.dtype) for value in values} == {True}


def numbers(found: dict[str, Any]) -> list[Array]:
    """All arrays of an output."""

    def walk(value: Any) -> list[Array]:
        return [a for item in value for a in walk(item)] if isinstance(value, list) else [value]

    return [array for key, value in found.items() if key != "raw" for array in walk(value)]


@pytest.fixture(scope="module")
def harsh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose scores are all near -90, where a lowest number plus a score would overflow."""
    golden, folder = case("pre_norm"), tmp_path_factory.mktemp("harsh")
    weights = dict(golden.weights)
    for name, array in golden.weights.items():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            weights[name] = np.full_like(array, 6.0 if "q_proj" in name else -6.0)
    save_file(weights, folder / "model.safetensors")
    golden.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [*DTYPES, "float32"])
@pytest.mark.parametrize("which", ["pre_norm", "post_norm", "harsh"])
def test_nothing_overflows(backend: Backend, harsh: Path, dtype: str, which: str) -> None:
    """With any padding, an empty row included, in every output, pads included."""
    golden = case("pre_norm" if which == "harsh" else which)
    folder = harsh if which == "harsh" else golden.folder
    ids = golden.inputs("unpadded")["input_ids"]
    masks = [golden.inputs(s).get("attention_mask", np.ones_like(ids)) for s in PADDINGS]
    masks.append(np.zeros_like(ids))
    flags = {"output_hidden_states": True, "output_attentions": True}
    for kernel in backend.kernels:
        model = backend.load(folder, dtype=dtype, attn_implementation=kernel)
        for mask in masks:
            inputs = {"input_ids": ids, "attention_mask": mask}
            for found in (
                backend.forward(model, **inputs),
                backend.forward(model, **inputs, **flags),
            ):
                assert all(np.isfinite(array).all() for array in numbers(found)), (kernel, mask)


@every_dtype
def test_padding_changes_no_token_in_16_bits(backend: Backend, dtype: str) -> None:
    """Left-padded rows decode as alone, where the reference's margin is clear in this format."""
    golden = case("post_norm")
    model = backend.load(golden.folder, dtype=dtype)
    batch = {k: golden.arrays[f"generate/greedy/left/{k}"] for k in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 8, "eos_token_id": None}
    found = backend.generate(model, **batch, **settings)[:, 7:]
    for row in range(3):
        ids = golden.arrays[f"generate/greedy/alone/{row}/input_ids"]
        assert backend.generate(model, ids, **settings)[0, -8:].tolist() == found[row].tolist()
