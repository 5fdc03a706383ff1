# SPDX-License-Identifier: Apache-2.0
"""Which backend the shared suite runs on: `pytest tests/suite --backend tf`, one per process.

Three runtimes in one process fight over threads and memory, so a process tests one of them.
"""

from __future__ import annotations

import importlib

import pytest

from tests.backends.base import Backend

BACKENDS = ("torch", "tf", "flax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="the framework that tests/suite runs on (default: %(default)s)",
    )


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """The adapter of the backend under test; one that cannot be imported is a failure."""
    name = request.config.getoption("--backend")
    adapter: Backend = importlib.import_module(f"tests.backends.{name}").BACKEND
    return adapter
