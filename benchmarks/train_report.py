# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/train.py` found, as data and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from benchmarks.contest import ratio
from benchmarks.tables import markdown, verdict
from benchmarks.train_table import BATCH, COLUMNS, LENGTH, LIMIT, ROUNDED_LIMIT, STEPS

PEER = "transformers"


@dataclass
class Entry:
    """One contestant of a column; times in seconds, memory in bytes."""

    losses: list[float]  # of the first steps, without dropout
    error: float | None = None  # of these, relative to those of the first peer
    versions: dict[str, str] = field(default_factory=dict)
    load: float = 0.0
    first: float = 0.0  # the first step, compilation included
    seconds: list[float] = field(default_factory=list)  # of each round
    peak: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return STEPS * BATCH * LENGTH / statistics.median(self.seconds)

    @property
    def compiling(self) -> float:
        """What the first step took beyond a later one."""
        return max(self.first - statistics.median(self.seconds) / STEPS, 0.0)


@dataclass
class Race:
    """One column; who differs was not timed, who is absent could not be started."""

    column: str
    entries: dict[str, Entry]
    absent: dict[str, str]

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        entries = {name: Entry(**entry) for name, entry in found["entries"].items()}
        return cls(**{**found, "entries": entries})

    @property
    def differing(self) -> list[str]:
        """Whose losses differ from the first peer's by more than is allowed."""
        contestants, found = COLUMNS[self.column].contestants, []
        for name, entry in self.entries.items():
            limit = LIMIT if contestants[name].exact else ROUNDED_LIMIT
            if entry.error is not None and not entry.error <= limit:
                found.append(name)
        return found

    def to_peer(self, name: str) -> float | None:
        """How many times faster than the fastest peer a contestant was."""
        peers = [n for n, e in self.entries.items() if n.split()[0] == PEER and e.seconds]
        ours = self.entries[name].seconds
        return min((ratio(ours, self.entries[peer].seconds) for peer in peers), default=None)


def weigh(entries: Mapping[str, Entry]) -> None:
    """Notes how far everyone's losses are from those of the first peer, where there is one."""
    expected = next((e.losses for name, e in entries.items() if name.split()[0] == PEER), None)
    for entry in entries.values():
        if expected is not None:
            pairs = zip(entry.losses, expected, strict=True)
            entry.error = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)


def table(races: Iterable[Race]) -> str:
    """Everyone's speed, ours with the ratio that was aimed at, memory and difference of losses."""
    head = ["training", "contestant", "tokens/s", f"to {PEER}", "first step", "memory", "losses"]
    rows = [head]
    for race in races:
        column = COLUMNS[race.column]
        for name, entry in race.entries.items():
            found = race.to_peer(name) if name in column.targets and entry.seconds else None
            against = "-" if found is None else verdict(found, column.targets[name])
            error = "-" if entry.error is None else f"{entry.error:.0e}"
            measured = ["-"] * 4
            if entry.seconds:
                first, peak = f"{entry.compiling:.1f} s", f"{entry.peak / 1e9:.1f} GB"
                measured = [f"{entry.rate:.0f}", against, first, peak]
            rows.append([column.title, name, *measured, error])
        rows += [[column.title, name, *["-"] * 4, why] for name, why in race.absent.items()]
    return markdown(rows)


def report(race: Race) -> str:
    """What is printed after each race."""
    lines = [table([race]), *(f"LOSSES DIFFER: {name}\n" for name in race.differing)]
    return "\n".join(lines)


def races_of(found: Mapping[str, Any]) -> Sequence[Race]:
    """The races in a file that `--json` wrote."""
    return [Race.from_json(each) for each in found["races"]]
