# SPDX-License-Identifier: Apache-2.0
"""Others at the same directory: who reads while it is written, and who has laid traps in it."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from opt_core import FormatError
from opt_core.pretrained import open_pretrained
from opt_core.staging import COMPLETE, PARTIAL, complete
from tests.faults.jobs import ARCHITECTURE, content, folders, make, save, tree

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


def saving(directory: Path, stop: Event) -> None:
    while True:
        for model in ("new", "old"):
            if stop.is_set():
                return
            save(str(directory), model)


def test_loads_beside_saves(place: Path) -> None:
    """Each finds one state, and none gives up: once, weights came with another configuration."""
    context = get_context("spawn")
    model, stop = make(place / "model", "old"), context.Event()
    process = context.Process(target=saving, args=(model, stop))
    process.start()
    found: Counter[float] = Counter()
    end = time.monotonic() + 30
    try:
        while min(found.values(), default=0) < 40 or len(found) < 2:
            assert time.monotonic() < end and process.is_alive(), found
            with open_pretrained(model, ARCHITECTURE) as loaded:
                sources = [*loaded.sources.values()]
                values = {float(value) for s in sources for value in np.unique(s.tensor.read())}
            assert values == {loaded.config.num_hidden_layers}
            assert values == {loaded.generation_config.max_length - 10}
            found.update(values)
    finally:
        stop.set()
        process.join()
