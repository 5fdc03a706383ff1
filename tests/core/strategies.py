# SPDX-License-Identifier: Apache-2.0
"""Arrays and state dicts for property tests: every dtype, any shape, empty and scalar ones too."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from opt_core.checkpoints.safetensors_format import DTYPES

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def arrays(draw: st.DrawFn) -> NDArray[Any]:
    """An array of random bits, sometimes a transposed view."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(shapes)
    seed = draw(st.integers(0, 2**32 - 1))
    high = 2 if dtype == np.bool_ else 256
    bits = np.random.default_rng(seed).integers(
        0, high, math.prod(shape) * dtype.itemsize, dtype=np.uint8
    )
    array = bits.view(dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


state_dicts = st.dictionaries(names, arrays(), max_size=8)


def same(left: NDArray[Any], right: NDArray[Any]) -> bool:
    """Tell whether dtype, shape and every bit are equal (NaNs included)."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.tobytes() == right.tobytes()
    )
