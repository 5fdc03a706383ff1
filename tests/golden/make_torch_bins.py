# SPDX-License-Identifier: Apache-2.0
"""Write the small `.bin` files that tests/core reads without torch, and what is in them.

Run with torch 2.x: `python tests/golden/make_torch_bins.py`. Each NAME.bin has a NAME.npz with the
same tensors, bfloat16 as the uint16 of the same bits under the name "NAME:bfloat16".
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent / "torch_bins"


def views() -> dict[str, torch.Tensor]:
    """Every way in which a tensor can lie in a storage."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 7
    return {
        "base": base,
        "tied": base,
        "transposed": base.T,
        "rows": base[1:3],
        "columns": base[:, 2:5],
        "steps": base[::2, ::3],
        "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "empty_view": base[4:],
        "one_column": base[:, :1],
        "parameter": torch.nn.Parameter(base * 2),
    }


def dtypes() -> dict[str, torch.Tensor]:
    """Every element type of a `torch.*Storage`."""
    floats = ("float64", "float32", "float16", "bfloat16")
    names = (*floats, "int64", "int32", "int16", "int8", "uint8", "bool")
    values = torch.tensor([[0, 1, 2], [3, 100, 1]])
    return {name: values.to(getattr(torch, name)) for name in names}


def module() -> OrderedDict[str, Any]:
    """The state dict of a module, with the `_metadata` that torch hangs on it, and a stranger."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4)).half()
    state: OrderedDict[str, Any] = layers.state_dict()
    state["steps_done"] = 7
    state["history"] = [1.5, None, {"lr": (1, 2)}]
    return state


def save(name: str, state: dict[str, Any], **options: Any) -> None:
    torch.save(state, HERE / f"{name}.bin", **options)
    arrays = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            value = value.detach()
            half = value.dtype == torch.bfloat16
            arrays[key + ":bfloat16" * half] = (value.view(torch.uint16) if half else value).numpy()
    np.savez_compressed(HERE / f"{name}.npz", **arrays)


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for make in (views, dtypes, module):
        save(f"{make.__name__}_zip", make())
        save(f"{make.__name__}_legacy", make(), _use_new_zipfile_serialization=False)
    save("module_protocol4", module(), pickle_protocol=4)


if __name__ == "__main__":
    main()
