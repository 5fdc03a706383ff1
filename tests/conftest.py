# SPDX-License-Identifier: Apache-2.0
"""Which backend the shared suite runs on: `pytest tests/suite --backend tf`, one per process.

Three runtimes in one process fight over threads and memory, so a process tests one of them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.backends.base import Backend
from tests.cases import case

# A machine with a GPU may lack it: tests/gpu needs none.
with contextlib.suppress(ModuleNotFoundError):
    from hypothesis import settings

    settings.register_profile("busy machines", deadline=None)  # files are slow on some
    settings.load_profile("busy machines")

BACKENDS = ("torch", "tf", "flax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="the framework that tests/suite runs on (default: %(default)s)",
    )
    parser.addoption(
        "--all-programs",
        action="store_true",
        help="run every case also where each of them is compiled, as in PyTorch",
    )


@pytest.fixture(scope="module", autouse=True)
def lasting_objects() -> None:
    """Spares the collector of garbage what the modules before have left, programs by the thousand.

    Keras collects all garbage after each layer that it quantizes: a second, each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """The adapter of the backend under test; one that cannot be imported is a failure."""
    name = request.config.getoption("--backend")
    adapter: Backend = importlib.import_module(f"tests.backends.{name}").BACKEND
    adapter.runs_all_programs = name == "torch" or request.config.getoption("--all-programs")
    return adapter


@pytest.fixture(scope="session")
def models(backend: Backend) -> Callable[..., Any]:
    """The model of a golden case by name, loaded once for each set of options."""
    loaded: dict[tuple[Any, ...], Any] = {}

    def get(name: str, **options: Any) -> Any:
        key = (name, *options.items())
        if key not in loaded:
            loaded[key] = backend.load(case(name).folder, **options)
        return loaded[key]

    return get


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden case pre_norm, to be changed."""
    return Path(shutil.copytree(case("pre_norm").folder, tmp_path / "model"))
