# SPDX-License-Identifier: Apache-2.0
"""The interpreter that forks, and a place where writing takes no time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.children import Children

MEMORY = "/dev/shm"


@pytest.fixture(scope="session")
def children() -> Iterator[Children]:
    """Forks that meet with accidents."""
    with Children() as started:
        yield started


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: a process that dies takes nothing with it there either."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        yield Path(folder)
