# SPDX-License-Identifier: Apache-2.0
"""Starts the worker of a framework and listens to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from opt_core import errors
from opt_core.errors import OPTError
from opt_zoo.backends import Framework
from opt_zoo.worker import Request

#: `-P`: no file of the current directory is taken for a module.
COMMAND = (sys.executable, "-P", "-m", "opt_zoo.worker")
ROOT = Path(__file__).parent.parent

OnEvent = Callable[[dict[str, Any]], None]


class WorkerError(OPTError, RuntimeError):
    """A framework's process ended without an answer."""


@dataclass(frozen=True)
class Reply:
    """What a worker answered: sequences [rows][tokens], seconds by stage, its peak memory."""

    sequences: list[list[int]]
    seconds: dict[str, float]
    peak_bytes: int


def run(request: Request, on_event: OnEvent = lambda event: None) -> Reply:
    """Runs the request in a process of its own, telling `on_event` of stages, progress and warnings.

    The process lives no longer than this one, which holds its stdin open.

    Raises:
        OPTError: what the worker found wrong, under its own class and message.
        WorkerError: the process died; the message holds the end of what it wrote to stderr.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise:
        with subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            encoding="utf-8",
            env=_environment(request.framework),
        ) as process:
            try:
                _ask(process.stdin, request)
                result = _listen(process.stdout, on_event)
                process.wait()  # before stdin closes
            except BaseException:
                process.kill()
                raise
        if result is not None:
            return result
        noise.seek(0)
        tail = "".join(noise.readlines()[-15:]).strip()
    raise WorkerError(
        f"The process of {request.framework} ended without an answer (exit code "
        f"{process.returncode}). The end of what it wrote:\n{tail or '(nothing)'}"
    )


def _environment(framework: Framework) -> dict[str, str]:
    """This process's, so that the worker finds the same opt_zoo, and Keras runs on TensorFlow."""
    environment = dict(os.environ)
    if ROOT.name not in ("site-packages", "dist-packages"):  # a source tree, perhaps not installed
        given = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([*([given] if given else []), str(ROOT)])
    if framework is Framework.TF:
        environment["KERAS_BACKEND"] = "tensorflow"
    return environment


def _ask(stdin: IO[str] | None, request: Request) -> None:
    if stdin is not None:
        with suppress(BrokenPipeError):  # a worker that died is reported from its exit code
            stdin.write(request.to_json() + "\n")
            stdin.flush()


def _listen(stdout: IO[str] | None, on_event: OnEvent) -> Reply | None:
    """The worker's reply, or None if its output ends before one."""
    for line in stdout or ():
        if not line.startswith('{"event"'):
            continue  # written by something else before the worker took the channel
        event = json.loads(line)
        match event.pop("event"):
            case "result":
                return Reply(**event)
            case "error":
                raise getattr(errors, event["kind"], OPTError)(event["message"])
            case name:
                on_event({"event": name, **event})
    return None
