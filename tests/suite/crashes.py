# SPDX-License-Identifier: Apache-2.0
"""What a training that is cut off leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from examples import training


def crash(patch: pytest.MonkeyPatch, at: int, copy: Path) -> None:
    """Has a training's folder copied after the step `at`, as it would be if it had ended there."""
    add = training.Log.add

    def copied(log: training.Log, step: int, **values: float) -> None:
        add(log, step, **values)
        if step == at and not copy.exists():
            shutil.copytree(log.path.parent, copy)

    patch.setattr(training.Log, "add", copied)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What was measured, without the times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
