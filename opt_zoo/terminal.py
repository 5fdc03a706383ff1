# SPDX-License-Identifier: Apache-2.0
"""The command's own process: what it writes to the terminal, and how it ends when told to."""

from __future__ import annotations

import io
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TransferSpeedColumn,
)

from conversion.text import printable
from opt_core.saving import Progress as OnBytes
from opt_zoo.processes import OnEvent

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def prepare() -> None:
    """Sets up this process: any text can be read and written, and a signal to end cleans up first.

    Bytes of stdin that are no text become half surrogates, which `Prompts.encode` refuses.
    """
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    for name in ("SIGTERM", "SIGHUP"):  # the second is not on every system; nohup ignores it
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit)
    show = warnings.showwarning

    def tell(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is UserWarning:
            say(f"warning: {message}")
        else:
            show(message, category, *where, **more)

    warnings.showwarning = tell


def say(message: str, style: str | None = None) -> None:
    """Prints a message on stderr as it is, but for what a terminal would act on."""
    err.print(printable(message, keep="\n"), style=style, markup=False, soft_wrap=True)


@contextmanager
def worker_progress(title: str) -> Iterator[OnEvent]:
    """Shows a worker's stages, progress and warnings on stderr while it runs."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TaskProgressColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        bar = bars.add_task(title, total=None)

        def on_event(event: dict[str, Any]) -> None:
            match event["event"]:
                case "stage":
                    bars.update(bar, description=f"{title}: {event['name']}")
                case "warning":
                    say(f"{title}: warning: {event['message']}")
                case _:
                    bars.update(bar, completed=event["done"], total=event["total"])

        yield on_event


@contextmanager
def bytes_progress(title: str) -> Iterator[OnBytes]:
    """Shows on stderr how many bytes of how many are written."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        bar = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # as an exception: workers are ended, unfinished files removed
