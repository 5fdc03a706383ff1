# SPDX-License-Identifier: Apache-2.0
"""JAX's worker of `benchmarks/gpu.py`, tried on the CPU with a small model."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.gpu_case import Case
from benchmarks.gpu_race import Request
from benchmarks.gpu_table import FULL, tiny
from benchmarks.workers import gpu_flax


@pytest.mark.parametrize("section", ["decode", "training"])
def test_a_job_without_a_gpu(section: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    part = next(part for part in tiny(FULL) if (part.section, part.framework) == (section, "flax"))
    request = Request(part.cases(), (), 1, 0.0, None, "cpu")
    monkeypatch.setattr(sys, "argv", ["gpu_flax.py", str(request)])
    gpu_flax.main()
    found = Case.from_json(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found.key == part.cases()[0].key
    assert found.timed("ours") and not found.differing
    assert [*found.absent] == ["ours cudnn"] and "expected a GPU" in found.absent["ours cudnn"]
