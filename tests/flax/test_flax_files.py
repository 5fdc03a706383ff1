# SPDX-License-Identifier: Apache-2.0
"""flax reads the `flax_model.msgpack` that is written without it, and we read its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import flax.serialization
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray
from strategies import same
from written import some, write_file

from opt_core.checkpoints import msgpack_writer
from opt_core.checkpoints.msgpack_format import DTYPES, read_msgpack
from opt_core.checkpoints.msgpack_writer import create_msgpack
from opt_core.checkpoints.sources import FileSource

ARRAYS = some(*DTYPES.values())


def assert_equal(found: dict[str, NDArray[Any]], wanted: dict[str, NDArray[Any]]) -> None:
    assert found.keys() == wanted.keys()
    assert all(same(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("limit", [flax.serialization.MAX_CHUNK_SIZE, 100, 3])
def test_flax_restores_what_we_write_and_would_write_the_same(limit: int, tmp_path: Path) -> None:
    with (
        patch.object(msgpack_writer, "MAX_CHUNK", limit),
        patch.object(flax.serialization, "MAX_CHUNK_SIZE", limit),
    ):
        content = write_file(create_msgpack, tmp_path / "flax_model.msgpack", ARRAYS).read_bytes()
        tree = flax.serialization.msgpack_restore(content)
        assert_equal(flatten_dict(tree, sep="."), ARRAYS)
        tree = unflatten_dict(ARRAYS, sep=".")
        assert flax.serialization.msgpack_serialize(tree, in_place=True) == content


@pytest.mark.parametrize("limit", [flax.serialization.MAX_CHUNK_SIZE, 100])
def test_we_read_what_flax_writes(limit: int, tmp_path: Path) -> None:
    wanted = {"step": 3, "rate": 0.1, "count": np.int32(5), "params": {"w": jnp.ones((40, 3))}}
    with patch.object(flax.serialization, "MAX_CHUNK_SIZE", limit):
        (tmp_path / "file").write_bytes(flax.serialization.to_bytes(wanted))
    tensors = {
        tensor.name: tensor.read() for tensor in read_msgpack(FileSource(tmp_path / "file"))[0]
    }
    assert_equal(
        tensors, {"count": np.array(5, np.int32), "params.w": np.ones((40, 3), np.float32)}
    )


def test_the_limit_is_that_of_flax() -> None:
    assert msgpack_writer.MAX_CHUNK == flax.serialization.MAX_CHUNK_SIZE
