# SPDX-License-Identifier: Apache-2.0
"""Plans and conversions as people and programs read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from conversion.convert import Conversion
from conversion.plan import Plan
from opt_core.formats import find_format

_MOST = 6  # names of files in one line


def printable(text: str, keep: str = "") -> str:
    """The text with escapes for what a terminal would act on or not show, but for `keep`."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def size(nbytes: float) -> str:
    """Bytes as people read them: 1.30 GB (10**9)."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """A plan as JSON takes it."""
    return {**asdict(plan), "source": str(plan.source)}


def conversion_to_dict(done: Conversion) -> dict[str, Any]:
    """A conversion as JSON takes it: its plan, and what came of it."""
    written = {"target": str(done.target), "verified": done.verified}
    return {**plan_to_dict(done.plan), **written}


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """A plan as rows of a table: what, and how much of it."""
    title = find_format(plan.to).title
    rows = [
        ("source", str(plan.source)),
        ("read", f"{size(plan.bytes_read)} from {_files(plan.files_read)} ({plan.container})"),
        ("open at a time", _files(plan.files_open)),
        ("peak memory", f"{size(plan.peak_bytes)} beyond the interpreter"),
        ("written", f"{size(plan.bytes_written)} as {plan.to}: {title}"),
        ("files", _shortened(plan.files_written)),
        ("tensors", f"{plan.tensors} ({', '.join(plan.dtypes)})"),
        ("architecture", plan.architecture),
    ]
    return [(name, printable(value)) for name, value in rows]


def conversion_line(done: Conversion) -> str:
    """What a conversion wrote, in one line."""
    plan = done.plan
    parts = [
        f"{plan.tensors} tensors",
        size(plan.bytes_written),
        ", ".join(plan.dtypes),
        plan.to,
        plan.architecture,
        *(["read back and found equal"] if done.verified else []),
    ]
    return printable(f"{done.target}: {', '.join(parts)}")


def plan_warnings(plan: Plan) -> list[str]:
    """What somebody who converts ought to know: a guess, and what is left out."""
    lines = []
    if plan.assumption:
        lines.append(f"{plan.architecture} {plan.assumption}. --architecture names another.")
    if plan.missing:
        lines.append(
            f"{', '.join(plan.missing)}: not in the source, so not in the target. Whoever loads it "
            f"as {plan.architecture} starts this head anew."
        )
    if plan.dropped:
        lines.append(
            f"{', '.join(plan.dropped)}: left out, since {plan.architecture} has no place for it."
        )
    return [f"warning: {line}" for line in lines]


def _files(files: int | Sequence[str]) -> str:
    count = files if isinstance(files, int) else len(files)
    return f"{count} file{'s' * (count != 1)}"


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - _MOST
    return ", ".join(names[:_MOST]) + (f" and {more} more" if more > 0 else "")
