# SPDX-License-Identifier: Apache-2.0
"""The limits within which hostile files must be dealt with, held by the operating system."""

from __future__ import annotations

import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS = 2.0
MEGABYTES = 256

_PAGE = resource.getpagesize()


class TooSlowError(BaseException):
    """More than `SECONDS` of processor time; no `except Exception` swallows it."""


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise TooSlowError(f"more than {SECONDS} s of processor time")


@contextmanager
def limited() -> Iterator[None]:
    """Hold a block to `SECONDS` of processor time, `MEGABYTES` beyond now, and to no warnings.

    Raises TooSlowError, and MemoryError where an allocation goes beyond the limit, even one that is
    never touched. Only for the main thread of a process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGPROF, _interrupt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + MEGABYTES * 2**20, hard))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def data_bytes() -> int:
    """Bytes of this process's private memory, as RLIMIT_DATA counts them (Linux)."""
    return int(Path("/proc/self/statm").read_bytes().split()[5]) * _PAGE
