# SPDX-License-Identifier: Apache-2.0
"""Several files appear together or not at all, whatever fails and whenever."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import OTHERS, WEIGHTS, equal, listing, read, write

from opt_core.checkpoints import CheckpointReader
from opt_core.errors import FormatError, InputError
from opt_core.staging import COMPLETE, PARTIAL, complete, staged

#: What the tests save: an old state and a new one, sharing some names.
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
OLD = {"config.json": "old", ONE: "old", TWO: "old"}
NEW = {"config.json": "new", ONE: "new"}


class BrokenError(Exception):
    """What goes wrong in the tests below."""


def save(directory: Path, files: dict[str, str], **options: Any) -> None:
    with staged(directory, obsolete=lambda name: name.startswith("model"), **options) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def interrupted(directory: Path, **options: Any) -> None:
    """A save that fails when one of its files is written."""
    with suppress(BrokenError), staged(directory, obsolete=lambda name: True, **options) as folder:
        (folder / ONE).write_text("one")
        raise BrokenError


def state(directory: Path) -> dict[str, str]:
    """The files in a directory, hidden ones too."""
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file()}


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, when: int) -> Iterator[list[str]]:
    """Lets the call number `when` of those that change a directory fail; gives the calls made."""
    calls: list[str] = []

    def breaking(name: str) -> Callable[..., Any]:
        function = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) - 1 == when:
                raise BrokenError
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, breaking(name))
        yield calls


def test_new_directories(tmp_path: Path) -> None:
    save(tmp_path / "a" / "b", NEW)
    assert state(tmp_path / "a" / "b") == NEW
    assert listing(tmp_path) == ["a"] and listing(tmp_path / "a") == ["b"]


def test_the_former_goes_and_the_rest_stays(tmp_path: Path) -> None:
    save(tmp_path, OLD)
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "runs").mkdir()
    save(tmp_path, NEW)
    assert state(tmp_path) == {**NEW, "notes": "mine"}
    assert "runs" in listing(tmp_path) and len(listing(tmp_path)) == 4


def test_folders_take_the_place_of_folders(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with staged(tmp_path, obsolete=lambda name: False) as folder:
            (folder / "orbax").mkdir()
            (folder / "orbax" / "_METADATA").write_text("")
            (folder / "orbax" / text).write_text(text)
    assert listing(tmp_path / "orbax") == ["_METADATA", "new"]


def test_a_folder_of_somebody_else_is_not_taken_for_a_part(tmp_path: Path) -> None:
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "thesis").write_text("")
    with pytest.raises(FormatError, match="found another folder. Move it away"):
        save_all(tmp_path)
    assert listing(tmp_path / "orbax") == ["thesis"] and listing(tmp_path) == ["orbax"]


def save_all(directory: Path) -> None:
    """A save that replaces whatever is part of a checkpoint."""
    with staged(directory, obsolete=lambda name: True):
        pass


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_while_writing_leaves_what_was_there(tmp_path: Path, existing: bool) -> None:
    directory = tmp_path / "a" / "b"
    if existing:
        save(directory, OLD)
    interrupted(directory)
    if existing:
        assert state(directory) == OLD and len(listing(directory)) == len(OLD)
    else:
        assert listing(tmp_path) == []


@pytest.mark.parametrize("existing", [False, True])
def test_wherever_it_fails_old_or_new_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    outcomes = set()
    for when in range(100):
        directory = tmp_path / str(when)
        if existing:
            save(directory, OLD)
        with failing(monkeypatch, when) as calls, suppress(BrokenError):
            save(directory, NEW)
        complete(directory)
        found = state(directory) if directory.exists() else {}
        assert found in ((OLD, NEW) if existing else ({}, NEW)), when
        save(directory, NEW)  # a rerun succeeds
        assert state(directory) == NEW
        assert not [name for name in listing(directory) if name.startswith(".")]
        outcomes.add(found == NEW)
        if len(calls) <= when:
            break
    assert outcomes == {False, True}
    assert not [name for name in listing(tmp_path) if name.startswith(".")]


def test_a_save_is_completed_by_who_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, OLD)
    with monkeypatch.context() as patch:
        patch.setattr("opt_core.staging.complete", raise_late(calls := []))
        with pytest.raises(BrokenError):
            save(tmp_path, NEW)
    assert len(calls) == 2 and (tmp_path / COMPLETE).is_dir() and state(tmp_path) == OLD
    complete(tmp_path)
    assert state(tmp_path) == NEW and not (tmp_path / COMPLETE).exists()
    complete(tmp_path)
    assert state(tmp_path) == NEW


def raise_late(calls: list[Path]) -> Callable[[Path], None]:
    """Does nothing the first time, as before a save; then fails."""

    def fake(directory: Path) -> None:
        calls.append(directory)
        if len(calls) > 1:
            raise BrokenError

    return fake


def test_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, WEIGHTS, 20)
    with CheckpointReader.open(tmp_path) as reader:
        mapped = {name: tensor.map() for name, tensor in reader.items()}
        write(tmp_path, OTHERS)
        assert equal(mapped, WEIGHTS)  # the files that are mapped keep their content
    assert equal(read(tmp_path), OTHERS)
    assert listing(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("old", [20, 50, 10**9])
@pytest.mark.parametrize("new", [8, 16, 10**9])
def test_an_earlier_save_gives_way(tmp_path: Path, old: int, new: int) -> None:
    write(tmp_path, WEIGHTS, old)
    for name in (
        "config.json",
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "my-model.safetensors",
    ):
        (tmp_path / name).write_text("stays")
    write(tmp_path, OTHERS, new)
    assert equal(read(tmp_path), OTHERS)
    ours = [name for name in listing(tmp_path) if re.match(r"\.|model[-.](?!fp16)", name)]
    assert len(ours) == {8: 4, 16: 3, 10**9: 1}[new]
    assert len(listing(tmp_path)) == len(ours) + 4


# --- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True])
def test_resuming_finds_what_an_earlier_try_has_left(tmp_path: Path, existing: bool) -> None:
    directory = tmp_path / "model"
    if existing:
        save(directory, OLD)
    interrupted(directory, plan="the plan", resume=True)
    with staged(directory, obsolete=lambda name: True, plan="the plan", resume=True) as folder:
        assert (folder / ONE).read_text() == "one"
        (folder / TWO).write_text("two")
    assert state(directory) == {ONE: "one", TWO: "two"}
    assert listing(tmp_path) == ["model"]


@pytest.mark.parametrize("options", [{"plan": "another", "resume": True}, {"plan": "the plan"}])
def test_another_plan_begins_anew(tmp_path: Path, options: dict[str, Any]) -> None:
    interrupted(tmp_path / "model", plan="the plan", resume=True)
    save(tmp_path / "model", NEW, **options)
    assert state(tmp_path / "model") == NEW
    assert listing(tmp_path) == ["model"]


# --- refusals -----------------------------------------------------------------------------------


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a directory to save into, found a file"):
        save(tmp_path / "file", NEW)


def test_two_at_a_time(tmp_path: Path) -> None:
    with staged(tmp_path / "model", obsolete=lambda name: True) as folder:
        (folder / ONE).write_text("")
        with pytest.raises(InputError, match="another process is saving here"):
            save(tmp_path / "model", NEW)
    assert state(tmp_path / "model") == {ONE: ""}


HOSTILE: dict[str, Any] = {
    "a path upwards": {"files": ["../config.json"], "remove": []},
    "a path from the root": {"files": [], "remove": ["/etc/passwd"]},
    "a path below": {"files": [], "remove": ["a/config.json"]},
    "somebody's file": {"files": [], "remove": ["thesis"]},
    "somebody's program": {"files": ["run.py"], "remove": []},
    "no list": {"files": "config.json", "remove": []},
    "nothing": {},
}


@pytest.mark.parametrize("moves", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_folder(tmp_path: Path, moves: dict[str, Any]) -> None:
    """A downloaded directory is completed when it is read: that must not reach anything else."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "run.py").write_text("mine")
    (tmp_path / COMPLETE).mkdir()
    (tmp_path / COMPLETE / "run.py").write_text("stolen")
    (tmp_path / COMPLETE / ".moves.json").write_text(json.dumps(moves))
    with pytest.raises(FormatError, match="no save of opt-zoo has left it"):
        complete(tmp_path)
    assert (tmp_path / "run.py").read_text() == "mine" and (tmp_path / "thesis").is_dir()


@pytest.mark.parametrize("name", [COMPLETE, PARTIAL])
def test_a_folder_that_is_a_link(tmp_path: Path, name: str) -> None:
    """It would lead out of the directory: once, a save emptied what it pointed to."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    for folder in (outside, inside):
        folder.mkdir()
    (outside / "config.json").write_text("mine")
    (outside / ".moves.json").write_text(json.dumps({"files": ["config.json"], "remove": []}))
    (inside / name).symlink_to(outside)
    with pytest.raises(FormatError, match="found a link"):
        save(inside, NEW)
    assert (outside / "config.json").read_text() == "mine"


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_list_of_moves_that_never_ends(tmp_path: Path, kind: str) -> None:
    (tmp_path / COMPLETE).mkdir()
    moves = tmp_path / COMPLETE / ".moves.json"
    if kind == "pipe":
        os.mkfifo(moves)
    else:
        moves.symlink_to("/dev/zero")
    with pytest.raises(FormatError, match="expected a small file|found a link"):
        complete(tmp_path)


def test_what_is_left_from_before_there_was_a_directory(tmp_path: Path) -> None:
    interrupted(tmp_path / "model", plan="the plan", resume=True)
    (tmp_path / "model").mkdir()
    save(tmp_path / "model", NEW)
    assert listing(tmp_path) == ["model"] and state(tmp_path / "model") == NEW


def test_a_process_that_was_forked_meanwhile_holds_nothing_up(tmp_path: Path) -> None:
    """A worker of a data loader inherits the lock; once, the save waited until it ended."""
    save(tmp_path, OLD)
    with staged(tmp_path, obsolete=lambda name: True) as folder:
        (folder / "config.json").write_text("new")
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE,
                                 pass_fds=descriptors(folder))  # fmt: skip
    try:
        assert child.poll() is None and state(tmp_path) == {"config.json": "new"}
    finally:
        child.communicate(b"\n")


def descriptors(folder: Path) -> tuple[int, ...]:
    """What this process has opened of a folder."""
    here = Path("/proc/self/fd")
    if not here.is_dir():
        pytest.skip("the system does not tell what is open")
    found = [entry for entry in here.iterdir() if os.path.realpath(entry) == str(folder)]
    assert found
    return tuple(int(entry.name) for entry in found)


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from opt_core.staging import staged\n"
        "with staged(pathlib.Path(sys.argv[1]), obsolete=lambda name: True) as folder:\n"
        "    (folder / 'half').write_text('')\n"
        "    os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=False)
    assert done.returncode == 9
    assert listing(tmp_path) == [f".model{PARTIAL}"]
    save(tmp_path / "model", NEW)
    assert state(tmp_path / "model") == NEW and listing(tmp_path) == ["model"]
