# SPDX-License-Identifier: Apache-2.0
"""These tests run where the environment says so (`make test-flash`), and are skipped elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from opt_torch import flash
from tests.flash.interpreter import ASKED, interpreted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not ASKED and Path(__file__).parent in item.path.parents:
            item.add_marker(
                pytest.mark.skip(reason="needs an environment of its own: make test-flash")
            )


@pytest.fixture(scope="session")
def package() -> ModuleType:
    return interpreted()


@pytest.fixture
def calls(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Lets the package compute on the CPU in float32; counts how often which of its kernels runs."""
    counts: Counter[str] = Counter()
    kernels = package.flash_attn_gpu
    assert kernels.__name__ == "flash_attn.flash_attn_triton_amd.interface_fa"

    def counted(name: str) -> None:
        kernel = getattr(kernels, name)

        def run(*arguments: object, **options: object) -> object:
            counts[name] += 1
            return kernel(*arguments, **options)

        monkeypatch.setattr(kernels, name, run)

    for name in ("fwd", "varlen_fwd", "bwd", "varlen_bwd"):
        counted(name)
    monkeypatch.setattr(flash, "DEVICES", ("cpu",))
    monkeypatch.setattr(flash, "DTYPES", (torch.float32,))
    monkeypatch.setattr("opt_core.calls._told", set())
    flash._FOUND.clear()
    assert flash.kernels().drops
    yield counts
    flash._FOUND.clear()
