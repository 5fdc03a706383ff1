# SPDX-License-Identifier: Apache-2.0
"""Every activation of the reference, by name."""

from __future__ import annotations

import numpy as np
import pytest

from opt_core.config import ACTIVATIONS
from tests.backends.base import Backend
from tests.cases import GOLDEN

with np.load(GOLDEN / "activations.npz") as _file:
    VALUES = dict(_file)


def test_the_golden_file_knows_all() -> None:
    assert VALUES.keys() - {"x"} == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(backend: Backend, name: str) -> None:
    found = backend.activation(name, VALUES["x"])
    assert found.dtype == np.float32
    # Library routines for exp, tanh and erf differ by some units in the last place.
    np.testing.assert_allclose(found, VALUES[name], rtol=4e-6, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_extreme_values_stay_finite(backend: Backend, name: str) -> None:
    found = backend.activation(name, np.array([-200.0, -50.0, 0.0, 50.0, 200.0], np.float32))
    assert np.isfinite(found).all()
