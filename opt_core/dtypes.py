# SPDX-License-Identifier: Apache-2.0
"""Names of number formats, whatever framework's object stands for them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from opt_core.errors import InputError

#: The number formats that a model may be loaded in.
MODEL_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}


def dtype_name(dtype: Any) -> str:
    """`"float16"` for "float16", torch.float16, tf.float16, jnp.float16, np.float16 or "fp16".

    Raises:
        InputError: not a floating-point format that a model can be loaded in.
    """
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None)  # np.dtype, tf.DType
    if name is None:
        name = getattr(dtype, "__name__", str(dtype))  # a class such as np.float16, or torch's
    name = name.removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in MODEL_DTYPES:
        raise InputError(f"Unknown dtype {dtype!r}: expected one of {', '.join(MODEL_DTYPES)}.")
    return name
