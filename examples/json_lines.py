# SPDX-License-Identifier: Apache-2.0
"""Files of one JSON object a line, as the examples read them: what is wrong is told with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

HELD_OUT = 10  # one row of so many, where no file says what to measure

Row = TypeVar("Row")


class Line:
    """The object of one line, and where it stands."""

    def __init__(self, place: str, entries: dict[str, Any]) -> None:
        self.place, self.entries = place, entries

    def text(self, name: str) -> str:
        """The entry of that name, a text that says something."""
        value = self.entries.get(name)
        if not isinstance(value, str) or not value.strip():
            self.refuse(f'expected "{name}" with a text, found {json.dumps(value)[:80]}')
        try:
            value.encode()
        except UnicodeEncodeError:
            self.refuse(f'"{name}" holds half of a surrogate pair, which is no character')
        return value

    def refuse(self, reason: str) -> NoReturn:
        """Ends the program, and says why."""
        raise SystemExit(f"{self.place}: {reason}")


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that are not empty; one that holds none, or something else, is refused."""
    count = 0
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, 1):
                if data.strip():
                    count += 1
                    yield _parse(f"{path}, line {number}", data)
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from error
    if not count:
        raise SystemExit(f"{path}: expected JSON lines, found none")


def _parse(place: str, data: bytes) -> Line:
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError) as error:  # no JSON, no Unicode, or nested too deeply
        raise SystemExit(f"{place}: expected a line of JSON: {error}") from error
    if not isinstance(entries, dict):
        raise SystemExit(f"{place}: expected an object {{...}}, found {type(entries).__name__}")
    return Line(place, entries)


def train_and_held_out(
    read: Callable[[Path], list[Row]], train_file: Path, eval_file: Path | None
) -> tuple[list[Row], list[Row]]:
    """What is learnt from, and what is not but asked for: one row of ten, if no file holds others."""
    rows = read(train_file)
    if eval_file is not None:
        return rows, read(eval_file)
    if len(rows) < 2:
        raise SystemExit(
            f"{train_file}: has one row; it takes one to learn from, and one to hold out. "
            "Name another file by --eval-file."
        )
    return [row for i, row in enumerate(rows) if i % HELD_OUT], rows[::HELD_OUT]
