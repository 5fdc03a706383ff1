# SPDX-License-Identifier: Apache-2.0
"""Converts small models over every pair of formats and writes the table of docs/conversion.md."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from opt_core.formats import FORMATS
from tests.conversion.pairs import DTYPES, END, MODELS, SIZES, START, table, there_and_back


def main() -> None:
    """Counts for each pair how many conversions there and back were bit-equal."""
    equal: Counter[tuple[str, str]] = Counter()
    for first, model, dtype, size in product(FORMATS, MODELS, DTYPES, SIZES):
        source = ROOT / "tests" / "golden" / "formats" / model / "safetensors_untied"
        with tempfile.TemporaryDirectory() as folder:
            for second, same in there_and_back(source, first, dtype, size, Path(folder)):
                equal[first, second] += same
    path = ROOT / "docs" / "conversion.md"
    text = path.read_text()
    start, end = text.index(START), text.index(END) + len(END)
    path.write_text(text[:start] + table(equal) + text[end:])


if __name__ == "__main__":
    main()
