# SPDX-License-Identifier: Apache-2.0
"""docs/weights.md is what `make docs` writes."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_the_page_is_up_to_date() -> None:
    expected = runpy.run_path(str(DOCS / "make_weights.py"))["page"]()
    found = (DOCS / "weights.md").read_text(encoding="utf-8")
    assert found == expected, "docs/weights.md is out of date: run `make docs`"


def test_the_page_says_what_a_parameter_depends_on() -> None:
    text = (DOCS / "weights.md").read_text(encoding="utf-8")
    assert (
        "| `lm_head.weight` | (`vocab_size`, `word_embed_proj_dim`) | not `tie_word_embeddings` |"
        in text
    )
    assert "| opt-175b | 96 | 12288 | 96 | 12288 | 174,604,468,224 |" in text
