# SPDX-License-Identifier: Apache-2.0
"""How far from the truth a backend may be, and why; the only place for such numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: (backend, dtype) -> largest allowed error. For float32: against the reference's float32 values,
#: relative to the largest of them. For 16 bits: against the float64 specification on the same
#: rounded weights, relative to the reference implementation's error in the same dtype (both the root
#: mean square of a case, and the largest error on average over the cases).
TOLERANCES: Mapping[tuple[str, str], float] = {
    # Some hundred float32 roundings in two or three layers of width 16 to 40; measured 2e-7 to 1e-6.
    ("torch", "float32"): 1e-5,
    ("tf", "float32"): 1e-5,
    ("flax", "float32"): 1e-5,
    # The flash_attn package against our plain operations, of logits, losses and each gradient: the
    # same sums in another order, a block of keys at a time; measured 1e-7 to 4.3e-6.
    ("flash", "float32"): 1e-5,
    # The goal is 1: no further from the truth than the reference. The same sums in another order
    # (torch's fused kernel) scatter between 0.89 and 1.13 in a case, with an average of 1.00. What
    # would be wrong, such as a softmax in 16 bits or a layer in another format, shows in the
    # averages and in tests of its own.
    ("torch", "float16"): 1.25,
    ("torch", "bfloat16"): 1.25,
    ("tf", "float16"): 1.25,
    ("tf", "bfloat16"): 1.25,
    ("flax", "float16"): 1.25,
    ("flax", "bfloat16"): 1.25,
}


def relative_error(found: Array, expected: Array) -> float:
    """The largest difference, relative to the largest expected value; NaN counts as infinite."""
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    error = float(np.abs(found.astype(np.float64) - expected).max(initial=0.0)) / scale
    return error if np.isfinite(error) else float("inf")


def assert_close(found: Array, expected: Array, what: str, *, tolerance: float = 1e-5) -> None:
    """`tolerance` is relative to the largest expected value."""
    error = relative_error(found, expected)
    assert error <= tolerance, f"{what}: off by {error:.1e} of the largest value"
