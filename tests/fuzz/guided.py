# SPDX-License-Identifier: Apache-2.0
"""Fuzzing led by coverage, with atheris: `python -m tests.fuzz.guided hdf5 --seconds 300`.

atheris watches which branches of opt_core an input takes, and keeps those that take new ones. It is
no dependency of the project: install it in an environment of its own, with this project and its
development tools. What it changes is one file of a seed; the others stay beside it as they are.
Stops at the first finding, and saves the input that made it: two bytes that say which file of which
seed it is, then that file. Another run goes on from what the last one kept in its folder.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:
    sys.exit(
        "atheris is not installed, and it installs on some systems only (with CPython 3.11 on Linux "
        "x86-64 it does). Run `pip install atheris` in an environment with opt-zoo[dev], or use "
        "`python -m tests.fuzz.run`, which needs nothing more."
    )

with atheris.instrument_imports(include=["opt_core"]):
    from tests.fuzz.inputs import placed, scratch
    from tests.fuzz.seeds import Seed, all_seeds
    from tests.fuzz.targets import TARGETS, examine

from tests.fuzz.mutations import mutate

_MAX_LENGTH = 2**16


class Guided:
    """One reader under test, and the files of its seeds."""

    def __init__(self, reader: str, folder: Path, memory: Path) -> None:
        self.reader = reader
        self.folder = folder
        self.memory = memory
        self.seeds: list[tuple[Seed, str]] = [
            (seed, name) for seed in all_seeds()[reader] for name in seed.targets
        ]
        self.pieces = [seed.files[name] for seed, name in self.seeds]

    def corpus(self) -> Path:
        """Write the seeds for libFuzzer: two bytes that say which file is changed, then the file."""
        corpus = self.folder / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(self.pieces):
            if len(data) < _MAX_LENGTH:
                (corpus / f"{number:05d}").write_bytes(number.to_bytes(2, "big") + data)
        return corpus

    def test(self, data: bytes) -> None:
        """Read one input; raises what a finding is."""
        seed, name = self.seeds[int.from_bytes(data[:2], "big") % len(self.seeds)]
        with placed(self.memory, seed, {**seed.files, name: data[2:]}) as path:
            examine(self.reader, path)

    def change(self, data: bytes, max_size: int, number: int) -> bytes:
        """Change an input: by our own mutations, which know the formats, or libFuzzer's."""
        if number % 3:
            data = data[:2] + mutate(random.Random(number), data[2:], self.pieces)
            return data[:max_size]
        changed: bytes = atheris.Mutate(data, max_size)
        return changed


def main() -> None:
    """Run until the time is over, or something is found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("reader", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(".cache/guided"))
    options = parser.parse_args()
    with scratch() as memory:  # stays behind, empty: libFuzzer ends the process itself
        guided = Guided(options.reader, options.folder / options.reader, memory)
        settings: list[Any] = [
            sys.argv[0],
            f"-max_total_time={options.seconds}",
            f"-seed={options.seed}",
            f"-max_len={_MAX_LENGTH}",
            "-len_control=0",
            "-rss_limit_mb=2048",
            "-print_final_stats=1",
            f"-artifact_prefix={guided.folder}/",
            guided.corpus(),
        ]
        atheris.Setup([str(x) for x in settings], guided.test, custom_mutator=guided.change)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
