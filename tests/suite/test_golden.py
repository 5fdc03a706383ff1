# SPDX-License-Identifier: Apache-2.0
"""Every output of every golden case: what transformers 4.37.2 computes, we compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.backends.base import Array, Backend
from tests.cases import CASES, PADDINGS, Case, case
from tests.tolerances import TOLERANCES, assert_close

# Calls that ask for attentions fall back to "eager", which is said once per process.
pytestmark = pytest.mark.filterwarnings("ignore:attn_implementation=")

every_case = pytest.mark.parametrize("name", CASES)
#: Sizes, norms and projections in all ways: enough where no layer's arithmetic is in question.
few_cases = pytest.mark.parametrize(
    "name",
    [
        "pre_norm",
        "post_norm",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("untied_gelu", "no_affine", "gelu_new_odd")
        ),
    ],
)


def close(backend: Backend, found: Array, expected: Array, what: str) -> None:
    assert_close(found, expected, what, tolerance=TOLERANCES[backend.name, "float32"])


def check(backend: Backend, found: dict[str, Any], golden: Case, situation: str) -> None:
    """Compares all that the reference returned, at real tokens."""
    real = golden.real(situation)
    for name, expected in golden.outputs(situation).items():
        what = f"{golden.name} {situation} {name}"
        if name == "loss":
            close(backend, np.reshape(found[name], ()), expected, what)
        elif name == "logits":
            close(backend, found[name][real], expected[real], what)
        elif name == "hidden_states":
            for layer, (ours, theirs) in enumerate(zip(found[name], expected, strict=True)):
                close(backend, ours[real], theirs[real], f"{what}/{layer}")
        elif name == "attentions":  # [B, N, T, S] -> [B, T, N, S]
            for layer, (ours, theirs) in enumerate(zip(found[name], expected, strict=True)):
                ours, theirs = ours.swapaxes(1, 2), theirs.swapaxes(1, 2)
                close(backend, ours[real], theirs[real], f"{what}/{layer}")
        else:
            assert name == "past_key_values"
            for layer, (pair, wanted) in enumerate(zip(found[name], expected, strict=True)):
                for part, ours, theirs in zip(("key", "value"), pair, wanted, strict=True):
                    close(backend, ours, theirs, f"{what}/{layer}/{part}")


@every_case
@pytest.mark.parametrize("situation", PADDINGS)
def test_every_output(backend: Backend, models: Any, name: str, situation: str) -> None:
    golden = case(name)
    expected = golden.outputs(situation)
    assert {"logits", "loss", "hidden_states", "attentions"} <= expected.keys()
    flags = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    found = backend.forward(models(name), **golden.inputs(situation), **flags)
    check(backend, found, golden, situation)


@every_case
@pytest.mark.parametrize("situation", [*PADDINGS, "inputs_embeds"])
def test_logits_with_every_kernel(backend: Backend, models: Any, name: str, situation: str) -> None:
    """Attentions make a fused kernel fall back, so logits alone are the test of it."""
    assert "eager" in backend.kernels and len(backend.kernels) > 1
    golden = case(name)
    real = golden.real(situation)
    inputs = {k: v for k, v in golden.inputs(situation).items() if k != "labels"}
    expected = golden.outputs(situation)["logits"]
    for kernel in backend.kernels:
        model = models(name, attn_implementation=kernel)
        found = backend.forward(model, **inputs, use_cache=True)
        assert found.keys() - {"raw"} == {"logits", "past_key_values"}
        close(backend, found["logits"][real], expected[real], f"{name} {situation} {kernel}")


@every_case
def test_head_mask(backend: Backend, models: Any, name: str) -> None:
    golden = case(name)
    inputs = golden.inputs("head_mask")
    found = backend.forward(models(name), **inputs, output_attentions=True)
    check(backend, found, golden, "head_mask")


@every_case
@pytest.mark.parametrize("situation", PADDINGS)
def test_base_model(backend: Backend, models: Any, name: str, situation: str) -> None:
    """The bare model is loaded from the file of the model with a head."""
    golden = case(name)
    inputs = {k: v for k, v in golden.inputs(situation).items() if k != "labels"}
    found = backend.forward(models(name, architecture="OPTModel"), **inputs, use_cache=False)
    assert found.keys() == {"last_hidden_state", "raw"}
    real = golden.real(situation)
    expected = golden.arrays[f"{situation}/base/last_hidden_state"]
    close(backend, found["last_hidden_state"][real], expected[real], f"{name} {situation}")


@few_cases
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_cached_steps(backend: Backend, models: Any, name: str, fixed: bool) -> None:
    """A left-padded prompt of 7, then 3 tokens at once, then 1."""
    golden, model = case(name), models(name)
    past = backend.init_cache(model, 3, 11) if fixed else None
    for step in range(3):
        inputs = golden.inputs(f"cached/{step}")
        found = backend.forward(model, **inputs, past_key_values=past, use_cache=True)
        real = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :] == 1
        expected = golden.outputs(f"cached/{step}")["logits"]
        close(backend, found["logits"][real], expected[real], f"{name} step {step}")
        past = found["raw"]["past_key_values"]


@few_cases
def test_tuple_outputs(backend: Backend, models: Any, name: str) -> None:
    """`return_dict=False` gives the same values, in the reference's order, without their names."""
    golden = case(name)
    both = golden.inputs("unpadded")
    for entry in golden.facts["tuples"]:
        keys = ("input_ids", "labels") if entry["labels"] else ("input_ids",)
        inputs = {key: both[key] for key in keys}
        flags = ("use_cache", "output_hidden_states", "output_attentions")
        inputs |= {flag: entry[flag] for flag in flags}
        model = models(name, architecture=entry["class"])
        named = backend.forward(model, **inputs, return_dict=True)
        plain = backend.forward(model, **inputs, return_dict=False)
        assert [key for key in named if key != "raw"] == entry["names"]
        assert type(plain["raw"]) is tuple
        for key, value in zip(entry["names"], plain["tuple"], strict=True):
            same(value, named[key])


def same(left: Any, right: Any) -> None:
    """Equal nested lists of arrays: shapes, order and values, up to a thread's order of summation."""
    if isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            same(one, other)
    else:
        assert_close(left, right, "tuple output", tolerance=1e-6)


def test_outputs_are_dict_object_and_tuple_at_once(backend: Backend, models: Any) -> None:
    golden = case("pre_norm")
    inputs = golden.inputs("unpadded")
    output = backend.forward(models("pre_norm"), **inputs, use_cache=True)["raw"]
    assert list(output) == ["loss", "logits", "past_key_values"]
    assert output["logits"] is output.logits is output[1] is output.to_tuple()[1]
    assert output.hidden_states is None and "hidden_states" not in output
    with pytest.raises(AttributeError, match="no field 'logit'"):
        output.logit  # noqa: B018
