# SPDX-License-Identifier: Apache-2.0
"""The 992 files of opt-175b in their real sizes, but without values: the plan from headers alone."""

from __future__ import annotations

import math
import mmap
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metaseq_files import Emitter, Object, run
from numpy.typing import NDArray

from conversion import plan
from opt_core import OPTConfig
from opt_core.checkpoints import TensorInfo
from opt_core.checkpoints.zip_writer import ZipFile
from opt_core.params import num_parameters, param_table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="makes sparse files of 350 GB"),
]
PARTS, RANKS = 8, 124
CONFIG = OPTConfig.preset("opt-175b").replace(vocab_size=50304)  # split over eight parts


def shapes_of_part() -> dict[str, dict[str, tuple[int, ...]]]:
    """FSDP module -> name in it -> shape, of one model-parallel part under metaseq's names."""
    groups: dict[str, dict[str, tuple[int, ...]]] = {"": {}}
    for param in param_table(CONFIG):
        name = param.name.removeprefix("model.").replace(
            "decoder.final_layer_norm", "decoder.layer_norm"
        )
        if ".k_proj." in name or ".v_proj." in name:
            continue
        shape, dim = list(param.shape), param.spec.split_dim()
        if dim is not None:
            shape[dim] //= PARTS
        if ".q_proj." in name:
            name = name.replace("q_proj", "qkv_proj")
            shape[0] *= 3
        path = ".".join(name.split(".")[:3]) if name.startswith("decoder.layers.") else ""
        groups.setdefault(path, {})[name.removeprefix(f"{path}.")] = tuple(shape)
    return groups


def nothing(length: int) -> NDArray[np.float16]:
    """An array that takes no memory as long as nobody looks into it."""
    return np.frombuffer(mmap.mmap(-1, 2 * length), np.float16)


def write_rank(path: Path, rank: int) -> None:
    """One of the 124 files of a part; its values are holes."""
    model: dict[str, Any] = {}
    described = []
    for module, shapes in shapes_of_part().items():
        numels = [math.prod(shape) for shape in shapes.values()]
        length = -(-sum(numels) // RANKS)
        model[f"{module}.flat_param_0" if module else "flat_param_0"] = nothing(length)
        params = {
            "names": list(shapes),
            "shapes": [Object("torch.Size", (shape,), called=True) for shape in shapes.values()],
            "numels": numels,
            "padding": max(0, min(length, (rank + 1) * length - sum(numels))),
        }
        described.append(
            {
                "fsdp_path": module,
                "params": {"flat_param_0": params},
                "no_broadcast_optim_state": False,
                "shared_param_info": [],
            }
        )
    emitter = Emitter()
    metadata = {"param_metadata": described, "buffer_names": []}
    program = b"\x80\x02" + emitter.emit({**run(model), "shard_metadata": metadata}) + b"."
    members: dict[str, Any] = {"archive/data.pkl": program}
    for key, array in enumerate(emitter.storages):
        info = TensorInfo(str(key), array.dtype, array.shape, path)
        members[f"archive/data/{key}"] = info
    file = ZipFile(path, members | {"archive/version": b"3\n"})
    file.finish()


def test_the_plan_of_the_real_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in range(PARTS):
        for rank in range(RANKS):
            write_rank(tmp_path / f"checkpoint_last-model_part-{part}-shard{rank}.pt", rank)
    CONFIG.save_pretrained(tmp_path)
    start = time.monotonic()
    found = plan(tmp_path, max_shard_size="10GB")
    seconds = time.monotonic() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert found.tensors == len(param_table(CONFIG)) == 1540
    assert found.bytes_read == found.bytes_written == 2 * num_parameters(CONFIG)
    assert len(found.files_read) == 992 and found.files_open <= 64
    largest = 2 * max(math.prod(param.shape) for param in param_table(CONFIG))
    assert found.peak_bytes < largest + 250e6
    with capsys.disabled():
        print(
            f"\n175B from headers: {found.bytes_read / 1e9:.0f} GB in 992 files, at most "
            f"{found.files_open} open, peak {found.peak_bytes / 1e6:.0f} MB beyond the interpreter, "
            f"largest tensor {largest / 1e6:.0f} MB; planned in {seconds:.0f} s, {memory / 1e3:.0f} MB"
        )
