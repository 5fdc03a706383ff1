# SPDX-License-Identifier: Apache-2.0
"""The float64 model against what transformers 4.37.2 computed, without any framework."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from opt_core.config import OPTConfig
from tests.reference.model import ACTIVATIONS, Array, Weights, forward, greedy

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in (GOLDEN / "cases").glob("*/case.json"))
SITUATIONS = ("unpadded", "left", "right", "mixed", "head_mask", "inputs_embeds")
INPUTS = {"input_ids", "attention_mask", "head_mask", "inputs_embeds", "labels"}
#: Largest difference allowed, relative to the largest value: float32 rounding in the golden files.
TOLERANCE = 2e-6

every_case = pytest.mark.parametrize("name", CASES)


def load_case(name: str) -> tuple[OPTConfig, Weights, dict[str, Array]]:
    folder = GOLDEN / "cases" / name
    with np.load(folder / "outputs.npz") as arrays:
        outputs = dict(arrays)
    return (
        OPTConfig.from_json_file(folder / "config.json"),
        load_file(folder / "model.safetensors"),
        outputs,
    )


def situation(outputs: dict[str, Array], name: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """What went in and what came out of one call of the reference."""
    found = {k.removeprefix(f"{name}/"): v for k, v in outputs.items() if k.startswith(f"{name}/")}
    found = {k: v for k, v in found.items() if not re.match(r"base/|b?float16/", k)}
    inputs = {k: v for k, v in found.items() if k in INPUTS}
    return inputs, {k: v for k, v in found.items() if k not in INPUTS}


def assert_close(found: Array, expected: Array, what: str) -> None:
    assert found.shape == expected.shape, what
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{what}: off by {error:.1e} of the largest value"


def test_there_are_golden_cases() -> None:
    assert len(CASES) >= 8


@every_case
@pytest.mark.parametrize("call", SITUATIONS)
def test_every_output_equals_the_reference(name: str, call: str) -> None:
    """Pads included: the reference's torch model and the specification also agree there."""
    config, weights, outputs = load_case(name)
    inputs, expected = situation(outputs, call)
    trace = forward(config, weights, **inputs)
    assert {"logits"} <= expected.keys() <= trace.keys()
    for key, value in expected.items():
        assert_close(trace[key], value, f"{name} {call} {key}")


@every_case
@pytest.mark.parametrize("call", ["unpadded", "left", "right", "mixed"])
def test_the_base_model_returns_the_last_hidden_state(name: str, call: str) -> None:
    config, weights, outputs = load_case(name)
    inputs, _ = situation(outputs, call)
    trace = forward(config, weights, **inputs)
    assert_close(trace["last_hidden_state"], outputs[f"{call}/base/last_hidden_state"], name)


@every_case
def test_cached_steps_equal_one_long_call(name: str) -> None:
    config, weights, outputs = load_case(name)
    ids = np.concatenate([outputs[f"cached/{step}/input_ids"] for step in range(3)], axis=1)
    steps = [outputs[f"cached/{step}/logits"] for step in range(3)]
    logits = forward(config, weights, ids, attention_mask=outputs["cached/2/attention_mask"])
    real = outputs["cached/2/attention_mask"] == 1
    expected = np.concatenate(steps, axis=1)
    assert_close(logits["logits"][real], expected[real], name)


@every_case
@pytest.mark.parametrize("settings", ["greedy", "eos", "eos_list"])
def test_greedy_tokens_equal_the_reference(name: str, settings: str) -> None:
    config, weights, outputs = load_case(name)
    facts: dict[str, Any] = json.loads((GOLDEN / "cases" / name / "case.json").read_text())
    options = facts["generation"][settings]["settings"]
    for row in range(3):
        key = f"generate/{settings}/alone/{row}"
        prompt, sequence = outputs[f"{key}/input_ids"][0], outputs[f"{key}/sequences"][0]
        found = greedy(
            config,
            weights,
            prompt.tolist(),
            options["max_new_tokens"],
            eos=options["eos_token_id"] or (),
        )
        assert found == sequence[len(prompt) :].tolist()


@pytest.mark.parametrize("model", ["pre_norm", "post_norm"])
@pytest.mark.parametrize(("folder", "key"), [("", "logits"), ("_untied", "untied/logits")])
def test_the_expected_logits_of_the_format_files(model: str, folder: str, key: str) -> None:
    files = GOLDEN / "formats" / model
    with np.load(files / "expected.npz") as arrays:
        expected = dict(arrays)
    config = OPTConfig.from_json_file(files / f"safetensors{folder}" / "config.json")
    weights = load_file(files / f"safetensors{folder}" / "model.safetensors")
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask")}
    assert_close(forward(config, weights, **inputs)["logits"], expected[key], f"{model} {key}")


def test_position_ids_say_the_same_as_the_mask() -> None:
    config, weights, outputs = load_case("post_norm")
    inputs, expected = situation(outputs, "left")
    position_ids = np.array([[-1, -1, -1, -1, 0, 1, 2], range(7), [-1, -1, 0, 1, 2, 3, 4]])
    trace = forward(config, weights, **inputs, position_ids=position_ids)
    assert_close(trace["logits"], expected["logits"], "position_ids")
    shifted = forward(config, weights, **inputs, position_ids=position_ids + 1)
    assert np.abs(shifted["logits"] - expected["logits"]).max() > 0.1


def test_a_row_of_pads_attends_evenly_and_stays_finite() -> None:
    config, weights, outputs = load_case("pre_norm")
    ids = outputs["unpadded/input_ids"]
    trace = forward(config, weights, ids, attention_mask=np.zeros_like(ids))
    np.testing.assert_allclose(trace["attentions/0"], 1 / ids.shape[1], rtol=1e-12)
    assert all(np.isfinite(value).all() for value in trace.values())


def test_the_loss_is_nan_if_every_label_is_ignored() -> None:
    config, weights, outputs = load_case("pre_norm")
    ids = outputs["unpadded/input_ids"]
    assert np.isnan(forward(config, weights, ids, labels=np.full_like(ids, -100))["loss"])


@every_case
def test_every_parameter_matters(name: str) -> None:
    """A golden file that some parameter cannot change would not notice its loss."""
    config, weights, outputs = load_case(name)
    inputs, expected = situation(outputs, "left")
    for parameter, value in weights.items():
        if parameter.endswith("k_proj.bias"):  # adds the same to every score of a query
            continue
        trace = forward(config, {**weights, parameter: 0.9 * value}, **inputs)
        change = (
            np.abs(trace["logits"] - expected["logits"]).max() / np.abs(expected["logits"]).max()
        )
        assert change > 1e-3, f"{parameter} hardly matters: {change:.1e}"


def test_every_activation_equals_the_reference() -> None:
    with np.load(GOLDEN / "activations.npz") as arrays:
        values = dict(arrays)
    x = values.pop("x").astype(np.float64)
    assert values.keys() == ACTIVATIONS.keys()
    for name, expected in values.items():
        np.testing.assert_allclose(
            ACTIVATIONS[name](x), expected, rtol=2e-6, atol=1e-6, err_msg=name
        )


def test_the_specification_imports_no_framework() -> None:
    """It must not lean on what it judges."""
    code = "import sys, tests.reference.model; print(*sys.modules)"
    root = GOLDEN.parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert "numpy" in loaded
    assert not loaded & {"torch", "tensorflow", "keras", "jax", "flax", "opt_core"}
