# SPDX-License-Identifier: Apache-2.0
"""Every pair of formats in every dtype, there and back, bit by bit; the docs say so (`make test-slow`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from opt_core.formats import FORMATS
from tests.conversion.pairs import DTYPES, END, MODELS, SIZES, START, table, there_and_back

ROOT = Path(__file__).parents[2]
#: To files, float16 is as bfloat16: numbers of two bytes.
TRIED = [pytest.param(x, marks=pytest.mark.slow) if x == "float16" else x for x in DTYPES]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TRIED)
@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_there_and_back(model: str, first: str, dtype: str, size: str, tmp_path: Path) -> None:
    source = ROOT / "tests" / "golden" / "formats" / model / "safetensors_untied"
    assert all(
        equal or pytest.fail(f"{first} -> {second} -> {first}")
        for second, equal in there_and_back(source, first, dtype, size, tmp_path)
    )


def test_the_table_in_the_docs() -> None:
    """Its numbers are those of the test above, which passes only if every cell is full."""
    text = (ROOT / "docs" / "conversion.md").read_text()
    full = len(MODELS) * len(DTYPES) * len(SIZES)
    expected = table({(first, second): full for first in FORMATS for second in FORMATS})
    assert text[text.index(START) : text.index(END) + len(END)] == expected
