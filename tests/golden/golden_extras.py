# SPDX-License-Identifier: Apache-2.0
"""Golden files beside the models: activation functions.

Used by make_golden.py, in an environment with transformers==4.37.2.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers.activations import ACT2FN


def record_activations(path: Path) -> None:
    """Write every activation of the reference's table on a grid: `x` and one key per name."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float32)
    values = {name: ACT2FN[name](x).numpy() for name in sorted(ACT2FN)}
    np.savez_compressed(path, x=x.numpy(), **values)
