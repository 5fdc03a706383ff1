# SPDX-License-Identifier: Apache-2.0
"""Conversions of many shards that go on where they were killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.faults.children import Children
from tests.faults.jobs import SHARD, content, hidden, make, tree

SIZE = "3KB"
WHOLE = 8  # shards of the new model at that size


def complete_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """The shards in a folder: which file each is, and when it was written."""
    files = ((path.name, path.stat()) for path in folder.glob(SHARD))
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in files}


def kill(children: Children, source: Path, target: Path, shards: int, **options: Any) -> Path:
    """Kills a conversion after so many shards; returns the hidden folder that it leaves."""
    options = {"max_shard_size": SIZE, "resume": True, "overwrite": True, **options}
    ending = children.run("convert_until", source, target, shards, **options)
    assert ending.code == -9, ending
    (folder,) = (
        path for path in target.parent.rglob(".*") if path.is_dir() and "partial" in path.name
    )
    assert len(complete_shards(folder)) == shards
    return folder


def convert(children: Children, source: Path, target: Path, **options: Any) -> None:
    options = {"max_shard_size": SIZE, "overwrite": True, **options}
    ending = children.run("convert", source, target, **options)
    assert ending.code == 0 and ending.error is None, ending


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("shards", range(WHOLE))
def test_only_what_is_missing_is_written(
    shards: int, existing: bool, place: Path, children: Children
) -> None:
    source, target = make(place / "source", "new"), place / "place" / "model"
    target.parent.mkdir()
    if existing:
        make(target, "old", SIZE)
    before = content(target)
    convert(children, source, place / "whole")
    kept = complete_shards(kill(children, source, target, shards))
    assert content(target) == before
    convert(children, source, target, resume=True)
    found = complete_shards(target)
    assert len(found) == WHOLE
    assert {name: found[name] for name in kept} == kept
    assert tree(target) == tree(place / "whole") and not hidden(target.parent)


def test_killed_again_and_again(place: Path, children: Children) -> None:
    source, target = make(place / "source", "new"), place / "model"
    for shards in range(WHOLE):
        kill(children, source, target, shards)
    convert(children, source, target, resume=True)
    assert content(target) == content(source) and not hidden(place)


def changed(source: Path) -> None:
    """Other weights in files of the same sizes."""
    file = source / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-4] + bytes(4))


def touched(source: Path) -> None:
    """Files that say that they are of another time."""
    os.utime(source / "model.safetensors", ns=(0, 0))


@pytest.mark.parametrize("change", [changed, touched])
def test_another_source_begins_anew(change: Any, place: Path, children: Children) -> None:
    source, target = make(place / "source", "new"), place / "model"
    former = complete_shards(kill(children, source, target, 4))
    change(source)
    convert(children, source, target, resume=True)
    assert not former.items() & complete_shards(target).items()
    assert content(target) == content(source) and not hidden(place)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float16"},
        {"max_shard_size": 3100},  # as many shards, with other tensors
        {"max_shard_size": "4KB"},
        {"architecture": "OPTModel"},
        {"to": "tf-safetensors"},
    ],
    ids=str,
)
def test_other_options_begin_anew(options: dict[str, Any], place: Path, children: Children) -> None:
    source, target = make(place / "source", "new"), place / "model"
    former = complete_shards(kill(children, source, target, WHOLE - 1))
    convert(children, source, place / "whole", **options)
    convert(children, source, target, resume=True, **options)
    assert not former.items() & complete_shards(target).items()
    assert tree(target) == tree(place / "whole") and not hidden(place)


def test_without_resume_everything_is_written(place: Path, children: Children) -> None:
    source, target = make(place / "source", "new"), place / "model"
    former = complete_shards(kill(children, source, target, 4))
    convert(children, source, target)
    assert not former.items() & complete_shards(target).items()
    assert content(target) == content(source) and not hidden(place)


def test_other_texts_come_along(place: Path, children: Children) -> None:
    """Texts and the configuration are written again in any case."""
    source, target = make(place / "source", "new"), place / "model"
    kill(children, source, target, 4)
    (source / "vocab.json").write_text("corrected")
    convert(children, source, target, resume=True)
    assert content(target) == content(source)
    assert (target / "vocab.json").read_text() == "corrected"
