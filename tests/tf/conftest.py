# SPDX-License-Identifier: Apache-2.0
"""A small model and its inputs, as Keras users hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opt_tf import TFOPTForCausalLM, TFOPTModel
from tests.cases import Case, case


@pytest.fixture(scope="session")
def golden() -> Case:
    return case("pre_norm")


@pytest.fixture(scope="session")
def inputs(golden: Case) -> dict[str, Any]:
    """Left-padded ids [3, 7], mask and labels."""
    return {key: value.astype(np.int32) for key, value in golden.inputs("left").items()}


@pytest.fixture
def model(golden: Case) -> TFOPTForCausalLM:
    return TFOPTForCausalLM.from_pretrained(golden.folder)


@pytest.fixture
def base(golden: Case) -> TFOPTModel:
    return TFOPTModel.from_pretrained(golden.folder)


@pytest.fixture
def logits(golden: Case) -> Any:
    return golden.outputs("left")["logits"]


@pytest.fixture
def real(golden: Case) -> Any:
    return golden.real("left")
