# SPDX-License-Identifier: Apache-2.0
"""Others at the same directory: who reads while it is written, and who has laid traps in it."""

from __future__ import annotations

import json
import os
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from opt_core import FormatError
from opt_core.staging import COMPLETE, PARTIAL, complete
from tests.faults.jobs import content, folders, make, save, tree

SAVES = 200


def save_again_and_again(directory: Path) -> None:
    for number in range(SAVES):
        folders(str(directory), ("old", "new")[number % 2])


def test_readers_do_not_disturb_a_save(place: Path) -> None:
    """A process that opens the directory again and again helps to complete it, or waits."""
    process = get_context("spawn").Process(target=save_again_and_again, args=(place / "model",))
    process.start()
    while process.is_alive():
        complete(place / "model")
        time.sleep(0)
    process.join()
    assert process.exitcode == 0
    assert set(tree(place / "model").values()) == {b"new"}


@pytest.mark.parametrize("name", [PARTIAL, COMPLETE])
def test_links_lead_nowhere(name: str, tmp_path: Path) -> None:
    """A folder of a save that is a link to somebody's files is not emptied, nor moved from."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "diary").write_text("dear")
    (home / ".moves.json").write_text(json.dumps({"files": ["diary"], "remove": []}))
    before = tree(home)
    model = make(tmp_path / "model", "old")
    (model / name).symlink_to(home)
    with pytest.raises(FormatError, match="found a link, which no save of opt-zoo has left"):
        save(str(model), "new")
    if name == COMPLETE:
        with pytest.raises(FormatError, match="found a link"):
            content(model)
    assert tree(home) == before


def test_a_link_to_a_list_of_moves(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "old")
    (model / COMPLETE).mkdir()
    (tmp_path / "moves").write_text(json.dumps({"files": [], "remove": ["config.json"]}))
    (model / COMPLETE / ".moves.json").symlink_to(tmp_path / "moves")
    with pytest.raises(FormatError, match="found a link"):
        complete(model)
    assert (model / "config.json").exists()


def test_a_list_of_moves_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / COMPLETE).mkdir()
    moves = tmp_path / COMPLETE / ".moves.json"
    os.mkfifo(moves)
    with pytest.raises(FormatError, match="expected a small file"):
        complete(tmp_path)
    moves.unlink()
    with open(moves, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(FormatError, match="expected a small file"):
        complete(tmp_path)
