# SPDX-License-Identifier: Apache-2.0
"""Runs jobs in processes that meet with an accident: a signal at a given moment, a full disk.

An interpreter in which everything is imported forks for every job, so that hundreds take seconds.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from opt_core.errors import OPTError
from tests.faults.jobs import JOBS

ROOT = Path(__file__).parents[2]
#: Calls into the system, as Python's functions for them are named. The moments before each are counted.
WATCHED = frozenset(
    "open read readinto write flush fsync close stat lstat flock listdir scandir "
    "mkdir rmdir rename replace unlink remove".split()
)


@dataclass(frozen=True)
class Accident:
    """What befalls a process: a signal at a moment of its work or after a time, no more room."""

    at: int | None = None  # the moment, counted from 0
    after: float | None = None  # seconds
    signal: int = signal.SIGKILL
    largest_file: int | None = None  # bytes; what goes beyond fails


NONE = Accident()


@dataclass(frozen=True)
class Ending:
    """What came of a process."""

    code: int  # as subprocess tells it: -9 if it was killed
    moments: int = 0  # that its work had
    seconds: float = 0.0
    error: str | None = None  # class and message
    result: Any = None


@dataclass
class Children:
    """The interpreter that forks; a context manager. `prefix` is a command that starts it."""

    prefix: Sequence[str] = ()
    process: subprocess.Popen[str] = field(init=False)

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [*self.prefix, sys.executable, "-P", "-m", "tests.faults.children"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.communicate()

    def run(self, job: str, *arguments: Any, accident: Accident = NONE, **options: Any) -> Ending:
        """Runs one of `jobs.JOBS` in a process of its own."""
        request = [job, arguments, options, asdict(accident)]
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()
        return Ending(**json.loads(self.process.stdout.readline()))


class Moments:
    """Counts calls into the system, and sends this process a signal at one of them.

    It begins where files begin to be staged: before that nothing is written, and much imported.
    """

    def __init__(self, accident: Accident) -> None:
        self.accident = accident
        self.begun = False
        self.count = 0

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "call":
            self.begun = self.begun or frame.f_globals.get("__name__") == "opt_core.staging"
        elif self.begun and event == "c_call" and function.__name__ in WATCHED:
            self.count += 1
            if self.count - 1 == self.accident.at:
                os.kill(os.getpid(), self.accident.signal)


def main() -> None:
    """Serves requests, a line of stdin each, with answers, a line of stdout each."""
    # A shell that runs the suite in the background ignores Ctrl-C, and its children would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        job, arguments, options, accident = json.loads(line)
        ending = _fork(partial(JOBS[job], *arguments, **options), Accident(**accident))
        print(json.dumps(asdict(ending)), flush=True)


def _fork(work: Callable[[], Any], accident: Accident) -> Ending:
    reading, writing = os.pipe()
    start = time.perf_counter()
    pid = os.fork()
    if not pid:
        os.write(writing, json.dumps(_meet(work, accident)).encode())
        os._exit(0)
    os.close(writing)
    if accident.after is not None:
        time.sleep(accident.after)
        os.kill(pid, accident.signal)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Ending(code, seconds=time.perf_counter() - start, **(json.loads(said) if said else {}))


def _meet(work: Callable[[], Any], accident: Accident) -> dict[str, Any]:
    if accident.largest_file is not None:  # Python ignores SIGXFSZ
        resource.setrlimit(resource.RLIMIT_FSIZE, (accident.largest_file,) * 2)
    found: dict[str, Any] = {}
    moments = Moments(accident)
    sys.setprofile(moments)
    try:
        found["result"] = work()
    except (OPTError, OSError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    finally:
        sys.setprofile(None)
    return {**found, "moments": moments.count}


if __name__ == "__main__":
    main()
