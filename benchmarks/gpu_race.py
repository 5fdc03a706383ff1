# SPDX-License-Identifier: Apache-2.0
"""Contestants in one process, on one device: what they compute is compared, then they run in turns."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from benchmarks.gpu_case import EVERYONE, LEFT_OUT, OUT_OF_TIME, PEER, Case, Entry, Memory

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


Distance = Callable[[Any, Any], float]


class Budget:
    """So many seconds from now on, or as many as it takes."""

    def __init__(self, seconds: float | None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.0)

    def spent(self) -> bool:
        return not self.left


def compete(
    case: Case, makers: Makers, distance: Distance, device: Device, rounds: int, budget: Budget
) -> None:
    """Fills a case: makes everyone, compares answers, measures memory, then runs the rounds.

    Args:
        case: without entries.
        makers: by name; one that cannot be made or cannot run is `absent`, with the reason.
        distance: of an answer to that of the first contestant, relative to the largest number.
        device: where they are.
        rounds: how often all run, one after the other.
        budget: when it is spent no round begins, and who was in none is `absent`.
    """
    contestants = _compared(case, makers, distance, device, budget)
    calls = {}
    for name, contestant in contestants.items():
        entry = case.entries[name]
        with excused(case, name, device):
            if budget.spent():
                break
            entry.start += device.seconds(contestant.run)
            entry.peak, entry.attention = device.peak(contestant.run), contestant.attention()
            calls[name] = _calls(device.seconds(contestant.run))
    for _ in range(rounds):
        for name in [name for name in calls if name not in case.absent]:
            with excused(case, name, device):
                if budget.spent():
                    break
                run = contestants[name].run
                seconds = sum(device.seconds(run) for _ in range(calls[name])) / calls[name]
                case.entries[name].seconds.append(seconds)
    late = [name for name in makers if name not in case.differing and not case.timed(name)]
    case.absent = dict.fromkeys(late, OUT_OF_TIME) | case.absent
    for name in case.absent:
        case.entries.pop(name, None)


def _compared(
    case: Case, makers: Makers, distance: Distance, device: Device, budget: Budget
) -> dict[str, Contestant]:
    """Those that compute what the first does."""
    contestants: dict[str, Contestant] = {}
    answers: list[Any] = []  # the first
    for name, make in makers.items():
        with excused(case, name, device):
            if budget.spent():
                break
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


@dataclass(frozen=True)
class Request:
    """What a worker (`benchmarks/workers/gpu_*.py`) is to do: its one argument, as JSON."""

    cases: list[Case]
    without: tuple[str, ...]  # contestants
    rounds: int
    needed: float  # seconds of a case
    seconds: float | None  # of all
    device: str  # of PyTorch

    @classmethod
    def read(cls, text: str) -> Self:
        found = json.loads(text)
        return cls(**{**found, "cases": [Case.from_json(each) for each in found["cases"]]})

    def __str__(self) -> str:
        return json.dumps(asdict(self))


def serve(
    request: Request, contest: Callable[[Case], tuple[Makers, Distance]], device: Device
) -> None:
    """Measures one case after the other; each is a line of JSON on stdout as soon as it is done."""
    budget = Budget(request.seconds)
    for case in request.cases:
        if budget.left < request.needed:
            case.absent[EVERYONE] = OUT_OF_TIME
        else:
            device.free()
            makers, distance = contest(case)
            case.absent = {name: LEFT_OUT for name in request.without if name in makers}
            makers = {name: make for name, make in makers.items() if name not in case.absent}
            compete(case, makers, distance, device, request.rounds, budget)
        print(json.dumps(asdict(case)), flush=True)


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
