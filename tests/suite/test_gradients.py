# SPDX-License-Identifier: Apache-2.0
"""Gradients of every parameter, against finite differences of the float64 specification.

The first real token of a left-padded row is predicted at a pad, from a row of attention in which
every key is masked. PyTorch's fused kernel on CPU once gave gradients there that were a hundred
thousand times too large, while its loss was right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.backends.base import Array, Backend
from tests.cases import case
from tests.reference.model import forward

pytestmark = pytest.mark.filterwarnings("ignore:attn_implementation=")
STEP = 1e-6


def labelled(name: str, situation: str) -> dict[str, Array]:
    """The inputs of a golden case, with a label at every real token."""
    inputs = {k: v for k, v in case(name).inputs(situation).items() if k != "labels"}
    mask = inputs.get("attention_mask", np.ones_like(inputs["input_ids"]))
    return {**inputs, "labels": np.where(mask == 1, inputs["input_ids"], -100)}


def slope(name: str, parameter: str, direction: Array, inputs: dict[str, Array]) -> float:
    """How the specification's loss changes along a direction of one parameter."""
    golden = case(name)
    losses = []
    for sign in (1, -1):
        moved = golden.weights[parameter].astype(np.float64) + sign * STEP * direction
        weights = {**golden.weights, parameter: moved}
        losses.append(forward(golden.config, weights, **inputs)["loss"])
    return float(losses[0] - losses[1]) / (2 * STEP)


@pytest.mark.parametrize("situation", ["unpadded", "left", "right"])
@pytest.mark.parametrize("name", ["pre_norm", "post_norm", "untied_gelu"])
def test_every_gradient(backend: Backend, name: str, situation: str) -> None:
    golden, inputs = case(name), labelled(name, situation)
    random = np.random.default_rng(0)
    for kernel in backend.kernels:
        model: Any = backend.load(golden.folder, attn_implementation=kernel)
        gradients = backend.gradients(model, **inputs)
        assert set(gradients) == set(golden.weights)
        for parameter, gradient in gradients.items():
            direction = random.choice([-1.0, 1.0], gradient.shape)
            if parameter.endswith("embed_tokens.weight"):
                direction[golden.config.pad_token_id] = 0  # looking up a pad never moves its row
            expected = slope(name, parameter, direction, inputs)
            found = float((gradient * direction).sum())
            # Some are zero: a softmax does not change with the key's bias.
            scale = max(abs(expected), float(np.linalg.norm(gradient)), 1e-2)
            assert abs(found - expected) <= 1e-4 * scale, (kernel, parameter, found, expected)


def test_looking_up_a_pad_moves_nothing(backend: Backend) -> None:
    """As `padding_idx` in the reference; a tied head moves the pad's row all the same."""
    for name, is_tied in (("untied_gelu", False), ("pre_norm", True)):
        golden = case(name)
        pad = golden.config.pad_token_id
        ids = golden.inputs("unpadded")["input_ids"].copy()
        ids[:, 1::2] = pad
        found = backend.gradients(backend.load(golden.folder), input_ids=ids, labels=ids)
        rows = found["model.decoder.embed_tokens.weight"]
        assert rows[ids[0, 0]].any() and rows[pad].any() == is_tied
