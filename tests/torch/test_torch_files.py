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

from opt_core import FormatError
from opt_core.checkpoints import CheckpointReader, zip_writer
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


# --- the other way: what torch writes -----------------------------------------------------------


class Subclass(torch.Tensor):
    """A tensor that may mean anything."""


def with_a_mark(tensor: torch.Tensor) -> torch.Tensor:
    tensor.mark = 1  # type: ignore[attr-defined]
    return tensor


COMPLEX = torch.complex(torch.ones(3), torch.arange(3.0))
#: Tensors that are more than values in a storage -> what is refused.
REFUSED: dict[str, tuple[torch.Tensor, str]] = {
    "negative": (COMPLEX.conj().imag, "tensor 'w': expected plain values, .*'neg'"),
    "negative parameter": (torch.nn.Parameter(COMPLEX.conj().imag), "tensor 'w': .*'neg'"),
    "conjugate": (COMPLEX.conj(), "ComplexFloatStorage"),
    "parameter with a state": (with_a_mark(torch.nn.Parameter(torch.ones(3))), "parameter_with_s"),
    "tensor with a state": (with_a_mark(torch.ones(3)), "_rebuild_from_type"),
    "subclass": (torch.ones(3).as_subclass(Subclass), "_rebuild_from_type"),
    "sparse": (torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"),
    "without values": (torch.ones(3, device="meta"), "_rebuild_meta_tensor"),
    "another type": (torch.ones(3).to(torch.float8_e4m3fn), "_rebuild_tensor_v3"),
}
TAKEN: dict[str, torch.Tensor] = {
    "positive": COMPLEX.imag,
    "resolved": COMPLEX.conj().imag.resolve_neg(),
    "trained": torch.ones(3, requires_grad=True),
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}


def torch_file(tensor: torch.Tensor, zipped: bool, folder: Path) -> Path:
    state = {"v": torch.ones(2), "w": tensor}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_than_values_is_refused(kind: str, zipped: bool, tmp_path: Path) -> None:
    tensor, message = REFUSED[kind]
    with pytest.raises(FormatError, match=message):
        CheckpointReader.open(torch_file(tensor, zipped, tmp_path))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", TAKEN)
def test_what_is_taken_is_what_torch_loads(kind: str, zipped: bool, tmp_path: Path) -> None:
    path = torch_file(TAKEN[kind], zipped, tmp_path)
    with CheckpointReader.open(path) as reader:
        expected = torch.load(path, weights_only=True)["w"].detach().numpy()
        np.testing.assert_array_equal(reader["w"].read(), expected)
