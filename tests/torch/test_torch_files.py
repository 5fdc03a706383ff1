# SPDX-License-Identifier: Apache-2.0
"""torch reads the `pytorch_model.bin` that is written without it, and runs nothing to do so."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from written import TORCH_DTYPES, some, write_file

from opt_core.checkpoints import zip_writer
from opt_core.checkpoints.torch_writer import create_torch_legacy, create_torch_zip

ARRAYS = some(*TORCH_DTYPES)


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, NDArray[Any]]) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        tensor = found[name]
        assert not tensor.requires_grad
        assert tensor.is_contiguous()
        assert str(tensor.dtype) == f"torch.{array.dtype}"
        assert tuple(tensor.shape) == array.shape
        if array.dtype == ml_dtypes.bfloat16:
            tensor, array = tensor.view(torch.int16), array.view(np.int16)
        assert tensor.numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("limit", [zip_writer.ZIP64, 300, 0], ids=["first", "mixed", "zip64"])
def test_a_zip_file(limit: int, mmap: bool, tmp_path: Path) -> None:
    with patch.object(zip_writer, "ZIP64", limit):
        path = write_file(create_torch_zip, tmp_path / "pytorch_model.bin", ARRAYS)
    state = torch.load(path, weights_only=True, mmap=mmap)
    assert_equal(state, ARRAYS)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in state.values())


def test_a_zip_file_of_which_only_the_shapes_are_read(tmp_path: Path) -> None:
    path = write_file(create_torch_zip, tmp_path / "pytorch_model.bin", ARRAYS)
    state = torch.load(path, weights_only=True, map_location="meta")
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        name: array.shape for name, array in ARRAYS.items()
    }


def test_a_legacy_file(tmp_path: Path) -> None:
    path = write_file(create_torch_legacy, tmp_path / "pytorch_model.bin", ARRAYS)
    assert_equal(torch.load(path, weights_only=True), ARRAYS)


@pytest.mark.parametrize("create", [create_torch_zip, create_torch_legacy])
def test_a_module_loads_it(create: Any, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    arrays = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    state = torch.load(write_file(create, tmp_path / "file", arrays), weights_only=True)
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    other.load_state_dict(state)
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True)
    )
