# SPDX-License-Identifier: Apache-2.0
"""`python -m conversion SOURCE TARGET`: `opt-zoo convert` without anything that it would install."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from conversion import text
from conversion.convert import convert, plan
from opt_core.dtypes import MODEL_DTYPES
from opt_core.errors import OPTError
from opt_core.formats import DEFAULT_FORMAT, FORMATS
from opt_core.params import ARCHITECTURES
from opt_core.saving import Progress

ERROR = 2
#: What a plan depends on.
PLANNED = ("source", "to", "dtype", "max_shard_size", "architecture", "config")


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts as the arguments say; returns 2 after an error, whose message goes to stderr."""
    options = vars(parser().parse_args(arguments))
    dry_run, as_json = options.pop("dry_run"), options.pop("json")
    try:
        if dry_run:
            _show_plan(options, as_json)
        else:
            _convert(options, as_json)
    except (OPTError, OSError) as error:
        _say(f"error: {error}")
        return ERROR
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments, those of `opt-zoo convert`."""
    summary = (convert.__doc__ or "").partition("\n")[0].replace("`", "")
    result = argparse.ArgumentParser(prog="python -m conversion", description=summary)
    add = result.add_argument
    add("source", help="directory, file of weights, index of several, or hub name")
    add("target", help="directory to write into; with --dry-run it is not looked at")
    formats = "; ".join(f"{name}: {format.title}" for name, format in FORMATS.items())
    add("--to", choices=[*FORMATS], default=DEFAULT_FORMAT, help=formats)
    add("--dtype", choices=[*MODEL_DTYPES], help="default: as stored")
    add("--max-shard-size", default="5GB", help="of each file (default: 5GB)")
    add("--architecture", choices=[*ARCHITECTURES], help="default: as config.json says")
    add("--config", help="config.json, directory or hub name; default: beside the weights")
    add("--overwrite", action="store_true", help="replace the model that is in the target")
    add(
        "--resume", action="store_true", help="keep complete files after a failure, and go on there"
    )
    add("--verify", action="store_true", help="read it back and compare before it appears")
    add("--dry-run", action="store_true", help="show the plan, from headers alone; write nothing")
    add("--json", action="store_true", help="print JSON for programs")
    return result


def _show_plan(options: dict[str, Any], as_json: bool) -> None:
    planned = plan(**{name: options[name] for name in PLANNED})
    _warn(text.plan_warnings(planned))
    if as_json:
        print(json.dumps(text.plan_to_dict(planned), indent=2))
        return
    for name, value in text.plan_rows(planned):
        print(f"{name:<16}{value}")


def _convert(options: dict[str, Any], as_json: bool) -> None:
    with _progress() as progress:
        done = convert(**options, progress=progress)
    _warn(text.plan_warnings(done.plan))
    if as_json:
        print(json.dumps(text.conversion_to_dict(done), indent=2))
    else:
        print(text.conversion_line(done))


@contextmanager
def _progress() -> Iterator[Progress]:
    """Writes the share that is done over itself, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    shown = ""

    def show(done: int, total: int) -> None:
        nonlocal shown
        share = f"{done / max(1, total):4.0%} of {text.size(total)}"
        if share != shown:
            shown = share
            print(f"\rconverting: {share}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print(file=sys.stderr)


def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        _say(line)


def _say(message: str) -> None:
    print(text.printable(message, keep="\n"), file=sys.stderr)
