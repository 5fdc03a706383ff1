# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/gpu.py` found of pure inference, as a table and as a picture."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_case import PEER, Case
from benchmarks.gpu_report import reasons
from benchmarks.gpu_table import FLASH_TARGETS, TARGET_LENGTH, TARGET_SIZE
from benchmarks.tables import markdown, verdict

FLASH = "flash_attention_2"
THEIR_FLASH, THEIR_SDPA = f"{PEER} {FLASH}", f"{PEER} sdpa"
HEAD = (
    "size",
    "tokens",
    "rows",
    "pads",
    "eager",
    "sdpa to eager",
    "flash to eager",
    "attention's memory, eager to flash",
    "peak, eager",
    "peak, flash",
    "flash to transformers' flash",
    "sdpa to transformers' sdpa",
    "error",
)
#: What is drawn: name -> label, colour.
LINES = {
    FLASH: ("flash", "tab:blue"),
    "sdpa": ("sdpa", "tab:green"),
    THEIR_FLASH: ("transformers, flash", "dimgray"),
    THEIR_SDPA: ("transformers, sdpa", "silver"),
}


def memory_ratio(case: Case) -> float | None:
    """How many times less memory attention takes with flash than in plain operations."""
    if not (case.timed("eager") and case.timed(FLASH)):
        return None
    eager, flash = (case.entries[name].attention for name in ("eager", FLASH))
    return eager / flash if eager is not None and flash else None


def target(case: Case, what: str) -> float | None:
    """What is aimed at, in the one size and length that it is said of."""
    aimed = (case.size, case.length) == (TARGET_SIZE, TARGET_LENGTH)
    return FLASH_TARGETS[what] if aimed else None


def table(cases: Iterable[Case]) -> str:
    """A row for each case: seconds of eager, the others by ratio, memory, the largest error."""
    rows: list[Sequence[str]] = [HEAD]
    for case in sorted(cases, key=lambda case: (case.size, case.length, case.padded, case.batch)):
        errors = [entry.error for entry in case.entries.values()]
        rows.append(
            [
                case.size,
                str(case.length),
                str(case.batch),
                "left" if case.padded else "none",
                _seconds(case, "eager"),
                _verdict(case.ratio("sdpa", "eager"), None),
                _verdict(case.ratio(FLASH, "eager"), target(case, "eager")),
                _verdict(memory_ratio(case), target(case, "memory")),
                _bytes(case, "eager"),
                _bytes(case, FLASH),
                _verdict(case.ratio(FLASH, THEIR_FLASH), target(case, "transformers")),
                _verdict(case.ratio("sdpa", THEIR_SDPA), None),
                f"{max(errors):.0e}" if errors else "-",
            ]
        )
    return markdown(rows)


def report(cases: Sequence[Case]) -> str:
    """What is printed after each case."""
    return table(cases) + reasons(cases)


def write_plot(cases: Sequence[Case], path: Path) -> None:
    """Speed-ups over plain operations: a picture for each size and length, dashed where padded."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(
            "No picture: matplotlib is missing. docs/make_performance.py draws it later.",
            file=sys.stderr,
        )
        return
    sizes = sorted({case.size for case in cases})
    lengths = sorted({case.length for case in cases})
    shape = (len(sizes), len(lengths))
    figure, grid = plt.subplots(*shape, figsize=(4.6 * shape[1], 3.2 * shape[0]), squeeze=False)
    for size, row in zip(sizes, grid, strict=True):
        for length, axes in zip(lengths, row, strict=True):
            chosen = [case for case in cases if (case.size, case.length) == (size, length)]
            _draw(axes, chosen)
            axes.set_title(f"{size}, {length} tokens", fontsize=9)
    grid[0][0].legend(fontsize=7)
    figure.supxlabel("rows; dashed: half of them padded on the left by a quarter", size=8)
    figure.supylabel("times as fast as ours in plain operations", size=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _draw(axes: Any, cases: Sequence[Case]) -> None:
    for name, (label, colour) in LINES.items():
        for padded, style in ((False, "o-"), (True, "o--")):
            points = [
                (case.batch, found)
                for case in sorted(cases, key=lambda case: case.batch)
                if case.padded is padded and (found := case.ratio(name, "eager")) is not None
            ]
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, style, color=colour, label=None if padded else label, ms=3)
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.set_xscale("log", base=2)
    batches = sorted({case.batch for case in cases})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.tick_params(labelsize=7)


def _verdict(found: float | None, aimed: float | None) -> str:
    return "-" if found is None else verdict(found, aimed)


def _seconds(case: Case, name: str) -> str:
    return f"{case.entries[name].median * 1e3:.1f} ms" if case.timed(name) else "-"


def _bytes(case: Case, name: str) -> str:
    peak = case.entries[name].peak if case.timed(name) else None
    return "-" if peak is None else f"{peak / 1e9:.2f} GB"
