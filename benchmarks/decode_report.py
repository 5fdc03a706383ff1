# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/decode.py` found, as data, as tables and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.contest import ratio
from benchmarks.decode_table import COLUMNS, JOBS, TARGETS, TITLES
from benchmarks.tables import markdown, verdict
from opt_core import OPTConfig
from opt_core.params import Kind, param_table

GROUPS = ("transformers", "keras-hub", "CTranslate2")


@dataclass
class Entry:
    """One contestant in one race; times in seconds."""

    versions: dict[str, str]
    load: float
    prepare: float
    first: float  # the first call, compilation included
    seconds: list[float] = field(default_factory=list)
    same: int = 0  # tokens before each row's first difference to ours as loaded
    tokens: int = 0
    margin: float = 0.0  # of the logits where tokens differ first, over the largest logit
    differs: bool = False
    error: float | None = None  # of the logits, over the largest logit

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def compiling(self) -> float:
        """What the first call took beyond a later one."""
        return max(self.first - self.median, 0.0)


@dataclass
class Race:
    """One job of one column and size; `bandwidth` in bytes per second."""

    size: str
    column: str
    job: str
    entries: dict[str, Entry]
    differing: list[str]
    absent: dict[str, str]
    bandwidth: float

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        entries = {name: Entry(**entry) for name, entry in found["entries"].items()}
        return cls(**{**found, "entries": entries})

    def timed(self, group: str) -> list[str]:
        """The contestants of a group that were timed: its name is the first word of theirs."""
        return [n for n, e in self.entries.items() if n.split()[0] == group and e.seconds]

    def rate(self, name: str) -> float:
        """Tokens per second; of a prefill, the prompt's."""
        job = JOBS[self.job]
        return job.batch * (job.new if job.new > 1 else job.prompt) / self.entries[name].median

    def fraction(self, name: str) -> float:
        """Of the measured bandwidth: the bytes of the weights, read once for each new token."""
        weights = step_bytes(self.size, rounded="int8" in name)
        return JOBS[self.job].new * weights / self.entries[name].median / self.bandwidth

    def rival(self, name: str, group: str) -> tuple[str, float] | None:
        """The fastest of a group, and how many times faster than it `name` was."""
        ours = self.entries[name].seconds
        rivals = [(other, ratio(ours, self.entries[other].seconds)) for other in self.timed(group)]
        return min(rivals, key=lambda rival: rival[1], default=None)

    def target(self, group: str) -> float | None:
        return TARGETS[self.job, self.column].get(group)


def step_bytes(size: str, *, rounded: bool) -> int:
    """What one step of decoding reads of a float32 model, or of one with matrices in eight bits.

    The table of positions is not read; that of the tokens is, as the head.
    """
    total = 0
    for param in param_table(OPTConfig.preset(size)):
        if "embed_positions" not in param.name:
            is_matrix = param.spec.kind in (Kind.LINEAR, Kind.EMBEDDING)
            total += math.prod(param.shape) * (1 if rounded and is_matrix else 4)
    return total


def against(race: Race, name: str, group: str) -> str:
    """The cell of one ratio, with the seconds that the rival's first call took longer."""
    rival = race.rival(name, group)
    if rival is None:
        return "-"
    other, found = rival
    mode = other.removeprefix(group).strip()
    seconds = f"{race.entries[other].compiling:.1f} s"
    return f"{verdict(found, race.target(group))} ({', '.join(filter(None, (mode, seconds)))})"


def job_table(races: Iterable[Race], job: str) -> str:
    """All of ours in one job: speed, share of the bandwidth, compilation, ratios with targets."""
    decodes = JOBS[job].new > 1
    head = ["ours", "tokens/s", *(["of bandwidth"] if decodes else []), "first call"]
    rows = [head + [f"to {group}" for group in GROUPS]]
    for race in races:
        for name in race.timed("ours"):
            entry, rate = race.entries[name], race.rate(name)
            title = name.removeprefix("ours").strip() or "as loaded"
            share = [f"{race.fraction(name):.0%}"] if decodes else []
            row = [f"{TITLES[race.column]}, {title}", f"{rate:.0f}", *share]
            first = f"{entry.compiling:.1f} s"
            rows.append([*row, first, *(against(race, name, group) for group in GROUPS)])
    return markdown(rows)


def peers_table(races: Iterable[Race]) -> str:
    """The peers: tokens per second, and how their tokens compare."""
    rows = [["framework", "peer", "tokens/s", "first call", "load", "tokens equal"]]
    for race in races:
        for name, entry in race.entries.items():
            if not name.startswith("ours"):
                tokens = f"{entry.same} of {entry.tokens}"
                tokens += f", margin {entry.margin:.0e}" if entry.same < entry.tokens else ""
                cells = ["-", "-"]
                if entry.seconds:
                    cells = [f"{race.rate(name):.0f}", f"{entry.compiling:.1f} s"]
                row = [TITLES[race.column], name, *cells, f"{entry.load:.1f} s", tokens]
                rows.append(row)
        rows += [
            [TITLES[race.column], name, "-", "-", "-", why] for name, why in race.absent.items()
        ]
    return markdown(rows)


def errors_table(races: Iterable[Race]) -> str:
    """What a layout or rounding of the weights does to logits and tokens."""
    rows = [["size", "framework", "contestant", "error of logits", "tokens equal"]]
    for race in races:
        for name, entry in race.entries.items():
            if entry.error is not None:
                tokens = f"{entry.same} of {entry.tokens}"
                row = [race.size, TITLES[race.column], name, f"{entry.error:.1e}", tokens]
                rows.append(row)
    return markdown(rows)


def summary_table(races: Sequence[Race]) -> str:
    """The issue's table: the better of ours to each peer, every size, with the target."""
    rows = [["size, job", "framework", "tokens/s", *(f"to {group}" for group in GROUPS)]]
    for race in races:
        best = max(race.timed("ours"), key=race.rate)
        cells = [f"{race.size}, {JOBS[race.job].title}", TITLES[race.column]]
        rivals = [race.rival(best, group) for group in GROUPS]
        ratios = [
            "-" if rival is None else verdict(rival[1], race.target(group))
            for group, rival in zip(GROUPS, rivals, strict=True)
        ]
        rows.append([*cells, f"{race.rate(best):.0f}", *ratios])
    return markdown(rows)


def report(races: Sequence[Race]) -> str:
    """What is printed after each race."""
    parts = []
    for race in races:
        title = f"{race.size}, {JOBS[race.job].title}, {TITLES[race.column]}"
        bandwidth = f"reading {race.bandwidth / 1e9:.1f} GB/s"
        parts += [f"{title} ({bandwidth})\n", job_table([race], race.job), peers_table([race])]
        if any(entry.error is not None for entry in race.entries.values()):
            parts.append(errors_table([race]))
        parts += [f"TOKENS DIFFER: {name}\n" for name in race.differing]
    return "\n".join(parts)


def races_of(found: Mapping[str, Any]) -> list[Race]:
    """The races in a file that `--json` wrote."""
    return [Race.from_json(each) for each in found["races"]]


def write_plot(found: Mapping[str, Any], path: Path) -> None:
    """Bars of tokens per second: a row of pictures for each size and job, a column per framework."""
    import matplotlib.pyplot as plt

    races = races_of(found)
    rows = list(dict.fromkeys((race.size, race.job) for race in races))
    columns = [column for column in COLUMNS if any(race.column == column for race in races)]
    height = 1.7 * len(rows)
    figure, grid = plt.subplots(
        len(rows), len(columns), figsize=(4.2 * len(columns), height), squeeze=False
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for race in races:
        axes = grid[rows.index((race.size, race.job))][columns.index(race.column)]
        axes.set_axis_on()
        names = [name for name, entry in race.entries.items() if entry.seconds][::-1]
        colours = ["tab:blue" if name.startswith("ours") else "silver" for name in names]
        axes.barh(names, [race.rate(name) for name in names], color=colours)
        job = JOBS[race.job]
        if job.new > 1:
            weights = step_bytes(race.size, rounded=race.job == "int8")
            axes.axvline(job.batch * race.bandwidth / weights, color="tab:red", linestyle=":")
        axes.set_title(f"{race.size}, {TITLES[race.column]}\n{job.title}", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.supxlabel(
        "tokens per second; dotted: weights read once per step at full bandwidth", size=8
    )
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
