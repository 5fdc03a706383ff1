# SPDX-License-Identifier: Apache-2.0
"""Orbax itself reads what we write, and we read what it writes, of our Flax parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

from opt_core import OPTConfig
from opt_core.checkpoints.orbax_format import find_orbax, read_orbax
from opt_core.checkpoints.orbax_writer import create_orbax
from opt_core.checkpoints.tensors import TensorInfo
from opt_flax import FlaxOPTForCausalLM

# Orbax says that it restores without being told where to put the arrays: that is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

CONFIG = OPTConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24
)


def standard(path: Path, params: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params)
    return path


def pytree(path: Path, params: Any, **options: bool) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, params)
    return path


def managed(path: Path, params: Any) -> Path:
    with ocp.CheckpointManager(path) as manager:
        manager.save(3, args=ocp.args.StandardSave(params))
        manager.wait_until_finished()
    return path / "3"


SAVES: dict[str, Callable[[Path, Any], Path]] = {
    "standard": standard,
    "plain folders": lambda path, params: pytree(path, params, use_ocdbt=False),
    "zarr3": lambda path, params: pytree(path, params, use_ocdbt=True, use_zarr3=True),
    "zarr3 in plain folders": lambda path, params: pytree(
        path, params, use_ocdbt=False, use_zarr3=True
    ),
    "a manager's step": managed,
}


@pytest.fixture(scope="module", params=[jnp.float32, jnp.bfloat16, jnp.float16])
def params(request: pytest.FixtureRequest) -> Any:
    tree = FlaxOPTForCausalLM(CONFIG, seed=1).params
    return jax.tree.map(lambda leaf: leaf.astype(request.param), tree)


def flat(tree: Any) -> dict[str, Any]:
    return {".".join(path): leaf for path, leaf in flatten_dict(tree).items()}


def check_equal(tree: dict[str, Any], expected: dict[str, Any]) -> None:
    assert tree.keys() == expected.keys()
    for name, leaf in expected.items():
        assert tree[name].dtype == leaf.dtype
        assert tree[name].shape == leaf.shape
        assert np.asarray(tree[name]).tobytes() == np.asarray(leaf).tobytes()


@pytest.mark.parametrize("variant", SAVES)
def test_reads_what_orbax_saves(params: Any, tmp_path: Path, variant: str) -> None:
    folder = find_orbax(SAVES[variant](tmp_path / "saved", params))
    assert folder is not None
    check_equal({tensor.name: tensor.read() for tensor in read_orbax(folder)[0]}, flat(params))


def test_orbax_restores_what_we_write(params: Any, tmp_path: Path) -> None:
    leaves = {f"params.{name}": np.asarray(leaf) for name, leaf in flat(params).items()}
    infos = [TensorInfo(name, leaf.dtype, leaf.shape, tmp_path) for name, leaf in leaves.items()]
    file = create_orbax(tmp_path / "orbax", infos, {})
    for name, leaf in leaves.items():
        file.write(name, [leaf])
    file.finish()
    tree = {"params": params}
    with ocp.StandardCheckpointer() as checkpointer:
        check_equal(flat(checkpointer.restore(tmp_path / "orbax")), flat(tree))
        restored = checkpointer.restore(tmp_path / "orbax", jax.tree.map(jnp.zeros_like, tree))
    check_equal(flat(restored), flat(tree))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    with ocp.PyTreeCheckpointer() as checkpointer:
        check_equal(flat(checkpointer.restore(tmp_path / "orbax")), flat(tree))
