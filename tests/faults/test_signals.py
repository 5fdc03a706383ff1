# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM while `opt-zoo convert` works: it ends at once and leaves nothing half-made."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.faults.children import NONE, Accident, Children
from tests.faults.jobs import content, hidden, make, tree

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}  # and the exit codes that tell of them


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_signal_to_the_command(
    number: signal.Signals, existing: bool, place: Path, children: Children
) -> None:
    source, old = make(place / "source", "new"), make(place / "old", "old")
    target = place / "place" / "model"
    before, after = (content(old) if existing else None), content(source)
    arguments = ("convert", source, target, "--overwrite", "--max-shard-size", "3KB")

    def run(accident: Accident = NONE) -> tuple[int, int]:
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()
        if existing:
            shutil.copytree(old, target)
        ending = children.run("command", *arguments, accident=accident)
        return ending.result["code"], ending.moments

    code, moments = run()
    assert code == 0 and content(target) == after
    unchanged = 0
    for moment in random.Random(0).sample(range(moments), 12):
        code, _ = run(Accident(at=moment, signal=number))
        assert code == SIGNALS[number], moment
        found = content(target)
        assert found in (before, after), moment
        # an empty folder may stay, if the signal came between its making and its claiming
        assert not [name for name in tree(target.parent) if "/." in name], moment
        unchanged += found == before
    assert unchanged > 3


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_keeps_what_can_be_resumed(
    number: signal.Signals, place: Path, children: Children
) -> None:
    source, target, whole = (
        make(place / "source", "new"),
        place / "place" / "model",
        place / "whole",
    )
    target.parent.mkdir()
    options = ("--resume", "--max-shard-size", "3KB")
    moments = children.run("command", "convert", source, whole, *options).moments
    command = ("command", "convert", source, target, *options)
    ending = children.run(*command, accident=Accident(at=moments // 2, signal=number))
    assert ending.result["code"] == SIGNALS[number] and not target.exists()
    assert any("model-00001-of" in name for name in tree(target.parent))
    assert children.run(*command).result["code"] == 0
    assert tree(target) == tree(whole) and not hidden(target.parent)
