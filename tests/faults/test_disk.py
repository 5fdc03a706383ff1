# SPDX-License-Identifier: Apache-2.0
"""A full disk, and targets that cannot be written: what was there stays, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.children import Accident, Children
from tests.faults.jobs import content, hidden, make, tree

NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
PAGE = 4096  # bytes: what a tmpfs gives at a time
EXISTING = pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])


@pytest.fixture(scope="module")
def mounting() -> Iterator[Children]:
    """Children that may mount file systems, which nobody else sees and which end with them."""
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"]
    if not shutil.which("unshare"):
        pytest.skip("no `unshare`, which lets anybody mount a small disk")
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no small disk can be mounted here: {tried.stderr.strip()}")
    with Children(NAMESPACE) as started:
        yield started


def mounted(children: Children, directory: Path, *options: str) -> Path:
    """A disk of its own at `directory`; returns where it is to be seen from here."""
    directory.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(["rw", *options]), "none", str(directory)]
    assert children.run("execute", *command).result == 0
    return Path(f"/proc/{children.process.pid}/root{directory}")


def jobs(source: Path, target: Path) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A save and two conversions, as arguments of `Children.run`."""
    convert = ("convert", source, target)
    return [
        (("save", target, "new"), {"size": "3KB"}),
        (convert, {"overwrite": True, "max_shard_size": "3KB"}),
        (convert, {"overwrite": True, "resume": True}),
    ]


def holds(directory: Path, model: str, tmp_path: Path) -> bool:
    """Whether configurations and weights are those of a model; a save leaves the tokenizer alone."""
    found, expected = content(directory), content(make(tmp_path / "expected", model))
    return found is not None and expected is not None and found[:3] == expected[:3]


@EXISTING
@pytest.mark.parametrize("number", range(3), ids=["save", "convert", "resume"])
def test_no_more_room_in_a_file(
    number: int, existing: bool, tmp_path: Path, children: Children
) -> None:
    """At whatever size of a file the disk is full."""
    source, target = make(tmp_path / "source", "new"), tmp_path / "place" / "model"
    target.parent.mkdir()
    if existing:
        make(target, "old")
    arguments, options = jobs(source, target)[number]
    resumes = "resume" in options
    before, source_before = tree(target.parent), tree(source)
    limit = 0
    while (
        ending := children.run(*arguments, **options, accident=Accident(largest_file=limit))
    ).error:
        assert ending.error.startswith("OSError: [Errno 27] File too large"), limit
        left = tree(target.parent)
        assert before == {k: v for k, v in left.items() if not (resumes and "-partial" in k)}
        assert resumes or not hidden(target.parent), limit
        assert existing or not target.exists()
        assert tree(source) == source_before
        limit += 1 + limit // 8
    assert limit > 1000  # the last limit that was too small
    assert not hidden(target.parent)
    assert holds(target, "new", tmp_path)


@EXISTING
@pytest.mark.parametrize("number", range(3), ids=["save", "convert", "resume"])
def test_a_small_disk(number: int, existing: bool, tmp_path: Path, mounting: Children) -> None:
    """However many pages are free."""
    source = make(tmp_path / "source", "new")
    disk = mounted(mounting, tmp_path / "disk", f"size={60 * PAGE}")
    arguments, options = jobs(source, tmp_path / "disk" / "model")[number]
    resumes = "resume" in options
    if existing:
        make(disk / "model", "old")
    before = tree(disk)
    room = os.statvfs(disk).f_bavail
    for free in range(room):
        (disk / "filler").write_bytes(bytes((room - free) * PAGE))
        ending = mounting.run(*arguments, **options)
        (disk / "filler").unlink()
        if ending.error is None:
            break
        assert ending.error.startswith("OSError: [Errno 28] No space left on device"), free
        left = tree(disk)
        assert before == {k: v for k, v in left.items() if not (resumes and "-partial" in k)}
        assert resumes or not hidden(disk), free
    assert 5 < free < room - 1
    assert not hidden(disk) and holds(disk / "model", "new", tmp_path)


# --- the command --------------------------------------------------------------------------------


def refused(children: Children, source: Path, target: Path, **options: Any) -> str:
    """What the command says when it fails: one line."""
    ending = children.run("command", "convert", source, target, "--overwrite", **options)
    assert ending.result["code"] == 2 and not ending.result["stdout"]
    (line,) = ending.result["stderr"].splitlines()
    return str(line)


@EXISTING
def test_the_command_on_a_full_disk(existing: bool, tmp_path: Path, children: Children) -> None:
    source, target = make(tmp_path / "source", "new"), tmp_path / "place" / "model"
    target.parent.mkdir()
    if existing:
        make(target, "old")
    before = tree(target.parent)
    line = refused(children, source, target, accident=Accident(largest_file=2000))
    assert line.startswith("error: [Errno 27] File too large")
    assert tree(target.parent) == before and not hidden(target.parent)


@EXISTING
def test_a_disk_that_is_read_only(existing: bool, tmp_path: Path, mounting: Children) -> None:
    source, target = make(tmp_path / "source", "new"), tmp_path / "disk" / "model"
    disk = mounted(mounting, tmp_path / "disk")
    if existing:
        make(disk / "model", "old")
    before = tree(disk)
    assert mounting.run("execute", "mount", "-o", "remount,ro", str(tmp_path / "disk")).result == 0
    assert refused(mounting, source, target).startswith("error: [Errno 30] Read-only file system:")
    ending = mounting.run("save", target, "new")
    assert ending.error is not None and ending.error.startswith("OSError: [Errno 30]")
    assert tree(disk) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@EXISTING
def test_a_directory_that_may_not_be_written(
    existing: bool, tmp_path: Path, children: Children
) -> None:
    source, target = make(tmp_path / "source", "new"), tmp_path / "place" / "model"
    (make(target, "old") if existing else target.parent).chmod(0o500)
    before = tree(tmp_path / "place")
    assert refused(children, source, target).startswith("error: [Errno 13] Permission denied:")
    assert tree(tmp_path / "place") == before


@pytest.mark.parametrize("target", ["file", "file/model", "file/deeper/model"])
def test_a_file_in_the_way(target: str, tmp_path: Path, children: Children) -> None:
    source = make(tmp_path / "source", "new")
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "file").write_text("mine")
    line = refused(children, source, tmp_path / "place" / target)
    assert "found a file" in line or "Not a directory" in line
    assert tree(tmp_path / "place") == {"file": b"mine"}


def test_a_folder_in_the_way_of_a_file(tmp_path: Path, children: Children) -> None:
    source, target = make(tmp_path / "source", "new"), make(tmp_path / "model", "old")
    (target / "model.safetensors").unlink()
    (target / "model.safetensors").mkdir()
    (target / "model.safetensors" / "mine").write_text("")
    before = tree(target)
    line = refused(children, source, target)
    assert "model.safetensors: expected a file" in line and line.endswith("Move it away.")
    assert tree(target) == before and not hidden(target)
