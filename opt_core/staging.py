# SPDX-License-Identifier: Apache-2.0
"""Several files that appear in a directory together or not at all, whatever happens meanwhile.

They are written into a hidden folder. Where the directory does not exist yet, that folder stands
beside it and gets its name in the end: one rename. Otherwise it stands inside, a rename declares it
complete, and then its files move to their places one by one; if that is interrupted, whoever opens
the directory next completes it, so the former files are never mixed with the new ones.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from opt_core.checkpoints.layouts import LAYOUTS
from opt_core.checkpoints.orbax_format import METADATA
from opt_core.errors import CheckpointError, FormatError, InputError
from opt_core.files import (
    JSON_LIMIT,
    TEXT_FILES,
    atomic_write,
    parse_json_object,
    plain_name,
    read_text_file,
    remove,
    sync_directory,
)

if sys.platform != "win32":  # there nothing tells a running save from a dead one
    import fcntl

PARTIAL = ".opt-zoo-partial"
COMPLETE = ".opt-zoo-complete"
_PLAN = ".plan"
_MOVES = ".moves.json"


@contextmanager
def staged(
    directory: Path,
    *,
    obsolete: Callable[[str], bool],
    plan: str = "",
    resume: bool = False,
) -> Iterator[Path]:
    """Give a folder to write into; at a good end what it holds is in `directory`.

    Args:
        directory: made if need be.
        obsolete: whether a file of that name in the directory belongs to what is replaced; it goes.
        plan: describes what will be written.
        resume: keeps the folder after a failure, and begins with that of an earlier try if its plan
            was the same.

    Raises:
        InputError: a directory that is a file, that another process is saving into, or that holds
            a folder where a file is to be.
        OSError: as the system says; then the directory is as it was.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: expected a directory to save into, found a file.")
    complete(directory)
    if directory.is_dir():
        for path in _former(directory, obsolete):
            _refuse_folder(path)
    with ExitStack() as held, ExitStack() as undo:
        _discard_sibling(directory)
        folder = _make_folder(directory, undo)
        if not _lock(folder, held):
            raise InputError(f"{directory}: another process is saving here. Wait for it to end.")
        _empty(folder, unless=plan if resume else None)
        if resume:
            atomic_write(folder / _PLAN, plan)
        else:
            undo.callback(remove, folder)
        yield folder
        (folder / _PLAN).unlink(missing_ok=True)
        sync_directory(folder)
        if folder.parent == directory:
            _declare_complete(folder, directory, obsolete)
        else:
            os.rename(folder, directory)
            sync_directory(directory.parent)
        undo.pop_all()
    complete(directory)


def complete(directory: Path) -> None:
    """Finish what was written whole but not moved to its places when its process died.

    Raises FormatError for a folder that no save of ours has left, CheckpointError where nothing can
    be moved, InputError if another process is at it for a minute.
    """
    folder = directory / COMPLETE
    _refuse_link(folder)
    while folder.is_dir():
        with ExitStack() as held:
            try:
                if _lock(folder, held, patience=60):  # else another process has done it meanwhile
                    _move(folder, directory)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                raise CheckpointError(
                    f"{directory}: a save was interrupted here when all was written, and cannot be "
                    f"completed ({error.strerror}). Make the directory writable, and try again."
                ) from error


def _move(folder: Path, directory: Path) -> None:
    """Move the files of a complete folder to their places, as far as they are not there."""
    moves = folder / _MOVES
    if moves.exists():
        files, gone = _read_moves(moves)
        for name in gone:
            _make_way(directory / name, folder)
        for name in files:
            if (folder / name).is_dir():
                _make_way(directory / name, folder)
            with suppress(FileNotFoundError):  # it was moved before
                os.replace(folder / name, directory / name)
    sync_directory(directory)
    remove(folder)


def _former(directory: Path, obsolete: Callable[[str], bool]) -> list[Path]:
    """The parts of a checkpoint in a directory that are to go."""
    return [path for path in directory.iterdir() if is_part(path.name) and obsolete(path.name)]


def _make_way(path: Path, folder: Path) -> None:
    """Remove a former part of a checkpoint; raises FormatError for a folder that is none.

    A folder goes with the hidden one, for if it were emptied here and that interrupted, nobody could
    tell any more what it was.
    """
    _refuse_folder(path)
    if path.is_dir() and not path.is_symlink():
        os.rename(path, folder / f".{path.name}.former")
    else:
        remove(path)


def _refuse_folder(path: Path) -> None:
    if path.is_dir() and not path.is_symlink() and not (path / METADATA).is_file():
        raise FormatError(
            f"{path}: expected a file, or a folder of orbax, in the place of the new one, found "
            "another folder. Move it away."
        )


def _read_moves(file: Path) -> tuple[list[str], list[str]]:
    """Return the names of the files that come, and of those that go: parts of checkpoints only."""
    _refuse_link(file)
    if not file.is_file() or file.stat().st_size > JSON_LIMIT:
        raise FormatError(f"{file}: expected a small file. Remove {file.parent}.")
    content = parse_json_object(file.read_bytes(), str(file))
    lists = [content.get("files"), content.get("remove")]
    match lists:
        case [list(files), list(gone)] if all(map(is_part, files + gone)):
            return files, gone
    raise FormatError(
        f"{file}: expected names of a checkpoint's files, found {str(content)[:200]}. Remove "
        f"{file.parent}: no save of opt-zoo has left it."
    )


def is_part(name: Any) -> bool:
    """Whether a file of that name belongs to a checkpoint: weights, configuration or tokenizer."""
    return plain_name(name) and (name in TEXT_FILES or any(layout.owns(name) for layout in LAYOUTS))


def _make_folder(directory: Path, undo: ExitStack) -> Path:
    """Make the hidden folder, unless an earlier try has left it, and what leads there."""
    if directory.is_dir():
        folder = directory / PARTIAL
    else:
        folder = _sibling(directory)
        for parent in reversed([path for path in directory.parents if not path.exists()]):
            parent.mkdir()
            undo.callback(_remove_empty, parent)
    _refuse_link(folder)
    folder.mkdir(exist_ok=True)
    return folder


def _lock(folder: Path, held: ExitStack, *, patience: float = 0) -> bool:
    """Claim the folder for this process, until it ends or is done; tell whether it is still there.

    Raises InputError if another process has it, and does not let go within `patience` seconds.
    """
    if sys.platform == "win32":
        return True
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    held.callback(os.close, descriptor)
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise InputError(
                    f"{folder}: another process is saving here. Wait for it to end."
                ) from None
            time.sleep(0.02)
        except OSError:  # a file system without locks
            return True
        else:
            break
    # Before the descriptor is closed: processes forked meanwhile have it, too.
    held.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def _sibling(directory: Path) -> Path:
    """Where what is written stands while there is no directory yet."""
    return directory.parent / f".{directory.name}{PARTIAL}"


def _discard_sibling(directory: Path) -> None:
    """Remove what a try has left from before there was a directory."""
    if directory.is_dir():
        with ExitStack() as held, suppress(InputError):
            if _lock(_sibling(directory), held):
                remove(_sibling(directory))


def _empty(folder: Path, *, unless: str | None) -> None:
    """Remove what an earlier try has left; if it had the plan, only what was half written."""
    plan = folder / _PLAN
    kept = unless is not None and plan.is_file() and read_text_file(plan) == unless.encode()
    for entry in folder.iterdir():
        half_written = entry.name.startswith(".") and entry != plan  # by atomic_write
        if half_written or not kept:
            remove(entry)


def _declare_complete(folder: Path, directory: Path, obsolete: Callable[[str], bool]) -> None:
    files = sorted(entry.name for entry in folder.iterdir())
    for name in files:  # one that could not take its place would hold up all others
        there = directory / name
        if there.exists() and there.is_dir() != (folder / name).is_dir():
            wanted, found = ("folder", "file") if there.is_file() else ("file", "folder")
            raise InputError(f"{there}: expected a {wanted}, found a {found}. Move it away.")
    former = {path.name for path in _former(directory, obsolete)}
    moves = {"files": files, "remove": sorted(former.difference(files))}
    atomic_write(folder / _MOVES, json.dumps(moves))
    os.rename(folder, directory / COMPLETE)
    sync_directory(directory)


def _refuse_link(path: Path) -> None:
    """Raise FormatError for a link, which would lead out of the directory."""
    if path.is_symlink():
        raise FormatError(f"{path}: found a link, which no save of opt-zoo has left. Remove it.")


def _remove_empty(directory: Path) -> None:
    with suppress(OSError):  # somebody else has put something there meanwhile
        directory.rmdir()
