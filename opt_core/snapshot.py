# SPDX-License-Identifier: Apache-2.0
"""Several files of a directory as they stood together, though others save into it meanwhile.

A save of ours moves its files one by one, and other programs write them so. Whoever reads more than
one of them looks before and after whether any has changed, and begins again if so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from opt_core.errors import CheckpointError, OPTError
from opt_core.files import FileState, file_state
from opt_core.staging import COMPLETE, complete, is_part

#: Seconds to wait after each try.
PAUSES = tuple(0.001 * 2**n for n in range(11))

_Result = TypeVar("_Result")


def read_together(directory: Path, read: Callable[[ExitStack], _Result]) -> _Result:
    """Return what `read` returns, all of which it has found in one state of a directory.

    Args:
        directory: a save that was interrupted there when all was written is completed first.
        read: opens and reads. It is called again if the directory has changed meanwhile; what it
            has entered on the stack is closed before, and stays open at a good end.

    Raises:
        CheckpointError: the directory changed at every try.
        OPTError, OSError: what `read` raises of a directory that does not change, and `complete`.
    """
    for pause in PAUSES:
        complete(directory)
        before = _state(directory)
        with ExitStack() as stack:
            try:
                result = read(stack)
            except (OPTError, OSError):
                if _is_still(before, directory):
                    raise
            else:
                if _is_still(before, directory):
                    stack.pop_all()
                    return result
        time.sleep(pause)
    raise CheckpointError(
        f"{directory}: expected one state of its files, found them changed during each of "
        f"{len(PAUSES)} tries: another process saves here all the time. Try again when it has ended."
    )


def _is_still(before: dict[str, FileState], directory: Path) -> bool:
    """Whether nothing has changed, nor stood half way between two states all the time."""
    return COMPLETE not in before and _state(directory) == before


def _state(directory: Path) -> dict[str, FileState]:
    """The parts of a checkpoint in a directory, and of a save that is not completed."""
    found = {}
    for path in directory.iterdir():
        if path.name == COMPLETE or is_part(path.name):
            try:
                found[path.name] = file_state(path)
            except OSError:  # moved meanwhile, or a link to nothing
                continue
    return found
