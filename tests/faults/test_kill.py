# SPDX-License-Identifier: Apache-2.0
"""kill -9 at any moment of a save or a conversion: the old or the new checkpoint is whole."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from opt_core.formats import FORMATS
from opt_core.staging import complete
from tests.faults.children import NONE, Accident, Children, Ending
from tests.faults.jobs import content, folders, hidden, make, tree

SHARDS, WHOLE = "3KB", "5GB"


@dataclass(frozen=True)
class Change:
    """What one job makes of a directory: from the old checkpoint, or none, to the new one."""

    job: str
    old: str | None  # max_shard_size of what is there before
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = "-".join(f"{value}" for value in self.options.values())
        return f"{self.job}-{options}-over-{self.old}"


SAVES = [
    Change("save", None, {"size": WHOLE}),
    Change("save", None, {"size": SHARDS}),
    Change("save", WHOLE, {"size": SHARDS}),
    Change("save", SHARDS, {"size": WHOLE}),
    Change("save", SHARDS, {"size": SHARDS}),
]
CONVERSIONS = [
    Change("convert", None, {"max_shard_size": SHARDS}),
    Change("convert", None, {"max_shard_size": SHARDS, "resume": True}),
    Change("convert", WHOLE, {"max_shard_size": SHARDS}),
    Change("convert", SHARDS, {"max_shard_size": SHARDS, "resume": True}),
]
TO_OTHER_FORMATS = [
    Change("convert", WHOLE, {"to": name}) for name in FORMATS if name != "safetensors"
]


@dataclass
class Trial:
    """A place to try a change in, again and again."""

    root: Path
    change: Change
    children: Children

    def __post_init__(self) -> None:
        self.source = make(self.root / "source", "new")
        self.old = make(self.root / "old", "old", self.change.old or WHOLE)
        self.target = self.root / "place" / "model"
        self.prepare()
        self.before = content(self.target)
        self.whole = self.run()
        self.after, self.files = content(self.target), set(tree(self.target))
        self.source_before = tree(self.source)
        assert self.whole.code == 0 and self.whole.error is None and self.after != self.before
        assert not hidden(self.target.parent)

    def prepare(self) -> None:
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir()
        if self.change.old:
            shutil.copytree(self.old, self.target)

    def run(self, accident: Accident = NONE) -> Ending:
        if self.change.job == "save":
            arguments: list[Path | str] = [self.target, "new"]
            return self.children.run("save", *arguments, accident=accident, **self.change.options)
        options = {"overwrite": True, **self.change.options}
        return self.children.run("convert", self.source, self.target, accident=accident, **options)

    def survives(self, accident: Accident) -> bool:
        """Checks what one accident leaves, and that a rerun succeeds; tells whether it was new."""
        self.prepare()
        ending = self.run(accident)
        assert ending.error is None and ending.code in (0, -9), ending
        found = content(self.target)
        assert found in (self.before, self.after), accident
        assert tree(self.source) == self.source_before
        again = self.run()
        assert again.error is None, (accident, again)
        assert content(self.target) == self.after, accident
        assert set(tree(self.target)) == self.files and not hidden(self.target.parent), accident
        return found == self.after


def moments(of: int, count: int) -> list[Accident]:
    """Accidents at some of so many moments."""
    return [Accident(at=moment) for moment in random.Random(0).sample(range(of), min(of, count))]


@pytest.mark.parametrize("change", SAVES + CONVERSIONS, ids=str)
def test_moments_of_its_work(change: Change, place: Path, children: Children) -> None:
    trial = Trial(place, change, children)
    last = Accident(at=trial.whole.moments - 1)
    outcomes = {trial.survives(each) for each in [*moments(trial.whole.moments, 20), last]}
    assert outcomes == {False, True}


@pytest.mark.parametrize("change", SAVES + CONVERSIONS, ids=str)
def test_moments_in_time(change: Change, place: Path, children: Children) -> None:
    trial = Trial(place, change, children)
    draw = random.Random(0).uniform
    for _ in range(8):
        trial.survives(Accident(after=draw(0, trial.whole.seconds)))


@pytest.mark.parametrize("change", TO_OTHER_FORMATS, ids=str)
def test_other_formats(change: Change, place: Path, children: Children) -> None:
    trial = Trial(place, change, children)
    for accident in moments(trial.whole.moments, 8):
        trial.survives(accident)


@pytest.mark.slow
@pytest.mark.parametrize("change", SAVES + CONVERSIONS + TO_OTHER_FORMATS, ids=str)
def test_every_moment(change: Change, place: Path, children: Children) -> None:
    trial = Trial(place, change, children)
    for moment in range(trial.whole.moments):
        trial.survives(Accident(at=moment))


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_folders(existing: bool, place: Path, children: Children) -> None:
    """Every moment, for formats whose weights are a folder."""
    old, new, target = place / "old", place / "new", place / "place" / "model"
    folders(str(old), "old")
    folders(str(new), "new")
    before, after = tree(old) if existing else {}, tree(new)

    def run(accident: Accident = NONE) -> Ending:
        return children.run("folders", target, "new", accident=accident)

    def prepare() -> None:
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()
        if existing:
            shutil.copytree(old, target)

    prepare()
    for moment in range(run().moments + 1):
        prepare()
        run(Accident(at=moment))
        complete(target)
        left = tree(target).items()
        found = {name: text for name, text in left if not name.startswith(".")}
        assert found in (before, after), moment
        run()
        assert tree(target) == after and not hidden(target.parent), moment
