# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/performance.md and README.md are those of the recorded figures."""

from __future__ import annotations

import json

import pytest

from benchmarks import train_report, train_table
from benchmarks.decode_report import races_of
from benchmarks.decode_table import COLUMNS, JOBS, SIZES
from docs.make_performance import PAGES, RESULTS, pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_figures(page) -> None:
    assert page.read_text("utf-8") == pages()[page]


def test_all_races_are_recorded() -> None:
    races = races_of(json.loads((RESULTS / "decode.json").read_text()))
    found = {(race.size, race.column, race.job) for race in races}
    assert found == {(s, c, j) for s in SIZES for c in COLUMNS for j in JOBS}


def test_no_exact_contestant_had_other_tokens() -> None:
    races = races_of(json.loads((RESULTS / "decode.json").read_text()))
    assert not [race.differing for race in races if race.differing]


def test_all_trainings_are_recorded_and_none_differs() -> None:
    races = train_report.races_of(json.loads((RESULTS / "train.json").read_text()))
    assert [race.column for race in races] == [*train_table.COLUMNS]
    assert not [race.differing for race in races if race.differing]
    for race in races:
        timed = {name for name, entry in race.entries.items() if entry.seconds}
        assert timed == {*train_table.COLUMNS[race.column].contestants}
