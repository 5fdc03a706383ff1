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
Figures = Mapping[str, Mapping[str, Mapping[str, float]]]


def live_table(figures: Figures) -> str:
    """The largest relative error of the logits against transformers 4.37.2, per backend."""
    rows = ["| models | torch | tf | flax |", "|---|---|---|---|"]
    for what, found in figures.items():
        if not what.startswith("precision "):
            cells = " | ".join(f"{found[name]['error']:.1e}" for name in BACKENDS)
            rows.append(f"| {what} ({found['torch']['models']}) | {cells} |")
    return "\n".join(rows) + "\n"


def precision_table(figures: Figures) -> str:
    """The root mean square distance from the float64 specification, per dtype."""
    rows = ["| dtype | reference | torch | tf | flax |", "|---|---|---|---|---|"]
    for dtype in ("float32", "bfloat16", "float16"):
        found = figures[f"precision {dtype}"]
        cells = " | ".join(f"{found[name]['error']:.3e}" for name in ("reference", *BACKENDS))
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
