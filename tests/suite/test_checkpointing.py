# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing changes memory alone: not losses, gradients, or anything in evaluation.

What a layer drops must be dropped again when it is computed again. Keras' own recomputation draws
anew, so that its gradients belong to no loss at all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opt_core.params import ARCHITECTURES
from tests.backends.base import Array, Backend
from tests.cases import case
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:attn_implementation=")
RATES = {"dropout": 0.4, "attention_dropout": 0.3}
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
IDS = np.where(MASK == 1, np.random.default_rng(0).integers(3, 103, MASK.shape), 1)
BATCH = {"input_ids": IDS, "attention_mask": MASK}
LABELS = np.where(MASK == 1, IDS, -100)


def load(backend: Backend, **options: Any) -> Any:
    return backend.load(case("pre_norm").folder, **RATES, **options)


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if "k_proj.bias" not in name:  # zero, but for rounding
            assert_close(gradient, expected[name], name)


def test_losses_and_gradients_stay(backend: Backend) -> None:
    model = load(backend)
    options = {**BATCH, "labels": LABELS, "use_cache": False, "train": True, "seed": 7}
    loss, gradients = (
        backend.forward(model, **options, compiled=True)["loss"],
        backend.gradients(model, **options),
    )
    model.gradient_checkpointing_enable()
    assert backend.forward(model, **options, compiled=True)["loss"] == pytest.approx(
        float(loss), rel=1e-6
    )
    assert_same(backend.gradients(model, **options), gradients)
    other = backend.gradients(model, **{**options, "seed": 8})
    assert np.abs(other["model.decoder.layers.0.fc1.weight"]).max() > 0
    with pytest.raises(AssertionError):
        assert_same(other, gradients)  # which dropout would not tell apart, if there were none


def test_dropped_layers_and_masked_heads(backend: Backend) -> None:
    """Of either kernel; which of the layers are dropped is drawn as without."""
    heads = np.array([[1, 0.5, 0, 1], [0, 1, 1, 0.25], [1, 1, 1, 0.5]], np.float32)
    options = {**BATCH, "labels": LABELS, "head_mask": heads, "train": True}
    for kernel in backend.kernels:
        model = load(backend, layerdrop=0.5, attn_implementation=kernel)
        for seed in (1, 2):
            model.gradient_checkpointing_disable()
            expected = backend.gradients(model, **options, seed=seed)
            model.gradient_checkpointing_enable()
            assert_same(backend.gradients(model, **options, seed=seed), expected)


def test_what_else_is_shown_stays(backend: Backend) -> None:
    model = load(backend)
    flags = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    options = {**BATCH, **flags, "train": True, "seed": 3}
    expected = backend.forward(model, **options, compiled=True)
    model.gradient_checkpointing_enable()
    found = backend.forward(model, **options, compiled=True)
    assert [*found] == [*expected]
    for name in ("hidden_states", "attentions"):
        for index, (a, b) in enumerate(zip(found[name], expected[name], strict=True)):
            assert_close(a, b, f"{name}[{index}]", tolerance=1e-6)


def test_a_cache_is_dropped_and_the_user_told_once(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opt_core.calls._told", set())
    model = load(backend)
    options = {**BATCH, "train": True, "seed": 3}
    expected = backend.forward(model, **options, use_cache=False, compiled=True)["logits"]
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="use_cache=True has no effect") as told:
        found = [backend.forward(model, **options, use_cache=True) for _ in range(2)]
    assert len(told) == 1
    for output in found:
        assert "past_key_values" not in output
        assert_close(output["logits"], expected, "logits", tolerance=1e-6)


def test_evaluation_stays(backend: Backend) -> None:
    """With its cache, growing or fixed."""
    model = load(backend)
    expected = backend.forward(model, **BATCH, compiled=True)
    model.gradient_checkpointing_enable()
    found = backend.forward(model, **BATCH, compiled=True)
    assert_close(found["logits"], expected["logits"], "logits", tolerance=1e-6)
    assert len(found["past_key_values"]) == len(expected["past_key_values"]) == 3
    cache = backend.init_cache(model, 3, 8)
    fixed = backend.forward(model, input_ids=IDS, past_key_values=cache, compiled=True)
    assert fixed["raw"]["past_key_values"].used == 5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_class_can_be_switched(backend: Backend, architecture: str) -> None:
    """On and off, without a trace in the configuration."""
    config = case("post_norm").config
    model = backend.create(config, architecture=architecture)
    assert model.is_gradient_checkpointing is False
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing is True
    assert "gradient_checkpointing" not in backend.config(model).to_dict()
    model.gradient_checkpointing_disable()
    assert model.is_gradient_checkpointing is False


def test_a_head_for_a_task(backend: Backend) -> None:
    config = case("pre_norm").config.replace(num_labels=3, **RATES)
    model = backend.create(config, architecture="OPTForSequenceClassification")
    options = {"input_ids": IDS, "labels": np.array([0, 2, 1]), "train": True, "seed": 5}
    expected = backend.gradients(model, **options)
    model.gradient_checkpointing_enable()
    assert_same(backend.gradients(model, **options), expected)
