# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks on a GPU have found, as data: one file, to which each run adds its cases."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Self

from benchmarks.command import write_json
from benchmarks.contest import ratio

#: The first word of every contestant's name that is not ours.
PEER = "transformers"
#: What must be alike in all runs that write one file.
SAME = ("card", "versions")
#: Why a case was not measured, or a contestant of it, in this run; `absent` says so.
OUT_OF_TIME = "not measured: out of time"
LEFT_OUT = "not measured: left to make gpu-full"
FAILED = "failed: "
EVERYONE = "everyone"
#: What is said of a device that tells no bytes: those of a CPU, and of JAX.
Memory = int | None


@dataclass
class Entry:
    """One contestant; times in seconds, memory in bytes beyond what lay there before the call."""

    error: float  # of what it computes, relative to the largest number of the first contestant's
    start: float = 0.0  # until the first call has ended: graphs recorded, programs compiled
    seconds: list[float] = field(default_factory=list)  # of one call, in each round
    peak: Memory = None
    attention: Memory = None  # while the first layer's attention runs

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Case:
    """One job of one size; who differs, or could not run, was not timed."""

    section: str
    size: str
    batch: int
    length: int  # tokens of each row; of decoding, of each prompt
    padded: bool = False
    framework: str = "torch"
    entries: dict[str, Entry] = field(default_factory=dict)
    differing: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # with the reason

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        entries = {name: Entry(**entry) for name, entry in found["entries"].items()}
        return cls(**{**found, "entries": entries})

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others."""
        return self.section, self.size, self.length, self.padded, self.batch, self.framework

    def lacks(self, *reasons: str) -> bool:
        """Whether someone was not measured for one of these reasons."""
        return any(why.startswith(reasons) for why in self.absent.values())

    def timed(self, name: str) -> bool:
        return name in self.entries and bool(self.entries[name].seconds)

    def ratio(self, name: str, other: str) -> float | None:
        """How many times faster than another a contestant was, if both were timed."""
        if not (self.timed(name) and self.timed(other)):
            return None
        return ratio(self.entries[name].seconds, self.entries[other].seconds)


@dataclass
class Results:
    """What one machine gave; `card` holds what its GPU reaches, in units per second."""

    environment: dict[str, Any]
    card: dict[str, float] = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each framework

    @classmethod
    def read(cls, path: Path) -> Self:
        found = json.loads(path.read_text("utf-8"))
        cases = [Case.from_json(each) for each in found["cases"]]
        return cls(found["environment"], found["card"], cases, found["tests"])

    @classmethod
    def opened(cls, path: Path, environment: Mapping[str, Any]) -> Self:
        """Those of a file, to be added to; none where there is no file yet.

        A file of another machine, or of other versions, is moved away: a run that begins on a machine
        which is lent for minutes must not end there.
        """
        if not path.exists():
            return cls(dict(environment))
        found = cls.read(path)
        expected, there = ({key: x[key] for key in SAME} for x in (environment, found.environment))
        if there == expected:
            return found
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
        away = next(name for name in names if not name.exists())
        path.rename(away)
        print(f"{path}: figures of {there}, not of {expected}: now {away}", file=sys.stderr)
        return cls(dict(environment))

    def add(self, case: Case) -> None:
        """Puts a case in the place of the same one of an earlier run."""
        self.cases = [each for each in self.cases if each.key != case.key] + [case]

    def of(self, section: str) -> list[Case]:
        return [case for case in self.cases if case.section == section]

    def find(self, case: Case) -> Case | None:
        """The same one, of an earlier run."""
        return next((each for each in self.cases if each.key == case.key), None)

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))


def differing(cases: Iterable[Case]) -> list[str]:
    """Who computed something else, and in which case."""
    return [
        f"{name} in {case.section}, {case.size}, {case.batch} x {case.length}"
        for case in cases
        for name in case.differing
    ]
