# SPDX-License-Identifier: Apache-2.0
"""JAX's worker of `benchmarks/gpu.py`, tried on the CPU with a small model."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import pytest

from benchmarks.gpu_case import Case
from benchmarks.gpu_table import TINY_JOBS
from benchmarks.workers import gpu_flax


@pytest.mark.parametrize("section", ["decode", "training"])
def test_a_job_without_a_gpu(section: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    job = TINY_JOBS[section]
    case = Case(section, "tiny", job.batch, job.lengths[0], framework="flax")
    request = {"case": asdict(case), "job": asdict(job), "rounds": 1}
    monkeypatch.setattr(sys, "argv", ["gpu_flax.py", json.dumps(request)])
    gpu_flax.main()
    found = Case.from_json(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found.key == case.key
    assert found.timed("ours") and not found.differing
    assert [*found.absent] == ["ours cudnn"] and "expected a GPU" in found.absent["ours cudnn"]
