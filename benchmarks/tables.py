# SPDX-License-Identifier: Apache-2.0
"""Figures as text: tables in Markdown, and a ratio beside the one that was aimed at."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def verdict(found: float, target: float | None) -> str:
    """A ratio beside its target."""
    if target is None:
        return f"{found:.2f}"
    return f"{found:.2f} of {target:g}" + ("" if found >= target else ", missed")
