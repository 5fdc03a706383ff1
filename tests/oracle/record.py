# SPDX-License-Identifier: Apache-2.0
"""Collects the figures that docs/numerics.md shows; `make oracle` renders them."""

from __future__ import annotations

import json
from pathlib import Path

FIGURES = Path(__file__).parent / "figures.json"


def record(what: str, framework: str, models: int, error: float) -> None:
    """Keeps the largest relative error of the logits that was seen, one entry per comparison."""
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    figures.setdefault(what, {})[framework] = {"models": models, "error": error}
    FIGURES.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
