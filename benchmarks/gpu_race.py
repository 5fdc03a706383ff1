# SPDX-License-Identifier: Apache-2.0
"""Contestants in one process, on one device: what they compute is compared, then they run in turns."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.gpu_case import PEER, Case, Entry, Memory

#: What keeps a peer from running here: a package, a compiler or a kernel that is missing.
FOREIGN = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
#: A round lasts about so many seconds, unless that takes more calls than these.
ROUND, MOST_CALLS = 0.1, 20
#: Longest reason that is kept, in characters.
LONGEST = 200


class Device(Protocol):
    """Where everyone computes."""

    #: What keeps one of ours from running here, such as memory.
    excuses: tuple[type[Exception], ...]

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call, with nothing under way before or after it."""

    def peak(self, call: Callable[[], object]) -> Memory:
        """The most bytes during one call, beyond those before it."""

    def free(self) -> None:
        """Gives back what nobody uses."""


def _no_attention() -> Memory:
    return None


@dataclass(frozen=True)
class Contestant:
    """One way to do a job."""

    answer: Callable[[], Any]  # what is compared with the first contestant's
    run: Callable[[], object]  # what is timed
    limit: float  # of the distance
    attention: Callable[[], Memory] = _no_attention


Makers = Mapping[str, Callable[[], Contestant]]


def compete(
    case: Case, makers: Makers, distance: Callable[[Any, Any], float], device: Device, rounds: int
) -> None:
    """Fills a case: makes everyone, compares answers, measures memory, then runs the rounds.

    Args:
        case: without entries.
        makers: by name; one that cannot be made or cannot run is `absent`, with the reason.
        distance: of an answer to that of the first contestant, relative to the largest number.
        device: where they are.
        rounds: how often all run, one after the other.
    """
    contestants = _compared(case, makers, distance, device)
    calls = {}
    for name, contestant in contestants.items():
        entry = case.entries[name]
        with excused(case, name, device):
            entry.start += device.seconds(contestant.run)
            entry.peak, entry.attention = device.peak(contestant.run), contestant.attention()
            calls[name] = _calls(device.seconds(contestant.run))
    for _ in range(rounds):
        for name in [name for name in calls if name not in case.absent]:
            with excused(case, name, device):
                run = contestants[name].run
                seconds = sum(device.seconds(run) for _ in range(calls[name])) / calls[name]
                case.entries[name].seconds.append(seconds)
    for name in case.absent:
        case.entries.pop(name, None)


def _compared(
    case: Case, makers: Makers, distance: Callable[[Any, Any], float], device: Device
) -> dict[str, Contestant]:
    """Those that compute what the first does."""
    contestants: dict[str, Contestant] = {}
    answers: list[Any] = []  # the first
    for name, make in makers.items():
        with excused(case, name, device):
            start = time.perf_counter()
            contestant = make()
            found = contestant.answer()
            seconds = time.perf_counter() - start
            if not answers:
                answers.append(found)
            error = distance(answers[0], found)
            case.entries[name] = Entry(error, seconds)
            if error <= contestant.limit:  # never true of a NaN
                contestants[name] = contestant
            else:
                case.differing.append(name)
    return contestants


@contextmanager
def excused(case: Case, name: str, device: Device) -> Iterator[None]:
    """Notes why a contestant cannot run, and goes on without it."""
    foreign = FOREIGN if name.split()[0] == PEER else ()
    try:
        yield
    except (*device.excuses, *foreign) as error:
        case.absent[name] = reason(error)
        print(f"  without {name}: {case.absent[name]}", file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    """An error in a few words."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "out of memory" in text.lower() or "RESOURCE_EXHAUSTED" in text:
        return "out of memory"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _calls(seconds: float) -> int:
    return min(max(math.ceil(ROUND / max(seconds, 1e-9)), 1), MOST_CALLS)
