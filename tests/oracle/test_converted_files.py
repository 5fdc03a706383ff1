# SPDX-License-Identifier: Apache-2.0
"""What `convert` writes in each format, read by the class of transformers 4.37.2 that it is for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.random_checkpoint import write_random_checkpoint
from conversion import convert
from tests.oracle.jobs import CONFIGS, Job, relative_error, run_ours, run_peer

pytestmark = pytest.mark.oracle
#: Framework of the reference -> formats that it reads whole, and in shards.
READS = {
    "pt": (("safetensors", "bin", "bin-legacy"), ("safetensors", "bin", "bin-legacy")),
    "tf": (("safetensors", "tf-safetensors", "h5"), ("h5",)),
    "flax": (("safetensors", "flax-safetensors", "msgpack"), ("msgpack",)),
}


def conversions(framework: str, source: Path, folder: Path) -> Iterator[Path]:
    """Converts a checkpoint to everything that a class of the reference reads."""
    for formats, size in zip(READS[framework], ("5GB", "20KB"), strict=True):
        for name in formats:
            target = folder / f"{source.name}-{name}-{size}"
            convert(source, target, to=name, max_shard_size=size)
            assert (len(list(target.glob("*.index.json"))) == 1) == (size != "5GB")
            yield target


@pytest.mark.parametrize("framework", READS)
def test_transformers_reads_what_we_convert(framework: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inputs = tmp_path / "in.npz"
    np.savez(inputs, input_ids=rng.integers(3, 96, (3, 7)), attention_mask=np.ones((3, 7), int))
    sources, jobs = [], []
    for name, config in CONFIGS.items():
        if framework == "tf" and name == "untied":
            continue  # the reference's TensorFlow class has no head of its own
        source = tmp_path / name
        write_random_checkpoint(source, config, scale=5.0)
        for target in conversions(framework, source, tmp_path):
            sources.append(Job(str(source), str(inputs)))
            jobs.append(Job(str(target), str(inputs)))
    expected = run_ours("torch", sources, tmp_path / "ours")
    found = run_peer("hf437", framework, jobs, tmp_path / "peer")
    for job, ours, theirs in zip(jobs, expected, found, strict=True):
        error = relative_error(theirs["logits"], ours["logits"], np.ones((3, 7)))
        assert error <= 1e-5, (job.checkpoint, error)
