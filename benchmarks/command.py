# SPDX-License-Identifier: Apache-2.0
"""What the commands of `benchmarks` that race have in common: arguments, and the machine's name."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def argument_parser(
    doc: str | None, columns: Iterable[str], rounds: int
) -> argparse.ArgumentParser:
    """`--column`, `--rounds`, `--peers` and `--json`, described by a docstring's first line."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--column", action="append", choices=[*columns])
    parser.add_argument("--rounds", type=int, default=rounds, help="(default: %(default)s)")
    parser.add_argument(
        "--peers",
        type=lambda name: Path(name).absolute(),
        default=os.environ.get("OPT_ZOO_PEERS", ".cache/oracle"),
        help="the folder of the peers' environments (default: OPT_ZOO_PEERS)",
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Whoever is killed meanwhile leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(path)


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    model, info = platform.processor(), Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
        "python": platform.python_version(),
    }
