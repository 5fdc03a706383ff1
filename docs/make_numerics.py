# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/numerics.md from the figures that `make oracle` has measured.

python docs/make_numerics.py            # after `make oracle`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

FIGURES = Path(__file__).parent.parent / "tests" / "oracle" / "figures.json"
PAGE = Path(__file__).parent / "numerics.md"
BEGIN, END = "<!-- begin {} -->\n", "<!-- end {} -->"
BACKENDS = ("torch", "tf", "flax")
LIVE = ("random configurations", "opt-125m", "opt-350m", "opt-1.3b")
Figures = Mapping[str, Mapping[str, Mapping[str, float]]]


def cell(found: Mapping[str, Mapping[str, float]], name: str, form: str) -> str:
    """One figure; a dash where it has not been measured."""
    return format(found[name]["error"], form) if name in found else "-"


def live_table(figures: Figures) -> str:
    """The largest relative error of the logits against transformers 4.37.2, per backend."""
    rows = ["| models | torch | tf | flax |", "|---|---|---|---|"]
    for what in LIVE:
        found = figures.get(what, {})
        models = max((int(figure["models"]) for figure in found.values()), default=0)
        cells = " | ".join(cell(found, name, ".1e") for name in BACKENDS)
        rows.append(f"| {what} ({models}) | {cells} |")
    return "\n".join(rows) + "\n"


def precision_table(figures: Figures) -> str:
    """The root mean square distance from the float64 specification, per dtype."""
    rows = ["| dtype | reference | torch | tf | flax |", "|---|---|---|---|---|"]
    for dtype in ("float32", "bfloat16", "float16"):
        found = figures.get(f"precision {dtype}", {})
        cells = " | ".join(cell(found, name, ".3e") for name in ("reference", *BACKENDS))
        rows.append(f"| {dtype} | {cells} |")
    return "\n".join(rows) + "\n"


def replace_block(text: str, name: str, content: str) -> str:
    """The page with the text between the two marks of that name replaced."""
    before, rest = text.split(BEGIN.format(name), 1)
    return (
        before
        + BEGIN.format(name)
        + content
        + END.format(name)
        + rest.split(END.format(name), 1)[1]
    )


def main() -> None:
    figures = json.loads(FIGURES.read_text())
    text = replace_block(PAGE.read_text(), "live", live_table(figures))
    PAGE.write_text(replace_block(text, "precision", precision_table(figures)))


if __name__ == "__main__":
    main()
