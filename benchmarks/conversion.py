# SPDX-License-Identifier: Apache-2.0
"""How much memory and time does a conversion take, for every pair of formats, against `cp`?

    python benchmarks/conversion.py [--preset opt-1.3b] [--formats safetensors bin ...] [--json FILE]

Writes a random float16 checkpoint into a temporary directory (opt-1.3b: 2.6 GB), converts it to each
format, and from each to each, by `python -m conversion` in a process of its own. Before and after
each, `cp` copies the same bytes; cp leaves them to the system, the conversion waits for the disk, so
cp is measured with such a wait too. What is read lies in the system's cache, for both. Exits with 1
if a figure is above its limit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # runs in a source tree, installed or not

from opt_core import OPTConfig
from opt_core.formats import FORMATS
from opt_core.params import param_table

CP = shutil.which("cp") or "/bin/cp"
ALLOWANCE = 250e6  # bytes of memory beyond the largest tensor
PAUSE = 3.0  # seconds
COPYING, CHANGING = 3.0, 6.0  # times `cp`: of safetensors to safetensors, of other pairs
WRITE = (
    "import sys; from pathlib import Path; from opt_core import OPTConfig\n"
    "from benchmarks.random_checkpoint import write_random_checkpoint\n"
    "config = OPTConfig.preset(sys.argv[2])\n"
    "write_random_checkpoint(Path(sys.argv[1]), config, dtype='float16')"
)


@dataclass(frozen=True)
class Pair:
    """What converting from one format to another took; seconds are medians."""

    source: str
    target: str
    turns: bool  # the formats' matrices are transposed with respect to each other
    seconds: float  # of the whole process
    cp: float
    cp_synced: float  # and waited for the disk, as the conversion does
    peak: int  # resident bytes of the whole process

    @property
    def limit(self) -> float:
        """Times `cp` that it may take."""
        return COPYING if self.source == self.target == "safetensors" else CHANGING


def settle() -> None:
    """Lets the system finish with what came before.

    A virtual machine gives memory that was freed back to its host after two seconds, and has to ask
    for it again: whoever writes at once would be the faster.
    """
    os.sync()
    time.sleep(PAUSE)


def python(*arguments: str) -> tuple[float, int]:
    """Runs the interpreter; returns its seconds and its peak of resident bytes."""
    settle()
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{arguments} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def convert(source: Path, target: Path, to: str) -> tuple[float, int]:
    """Converts; returns seconds and peak bytes."""
    return python("-m", "conversion", str(source), str(target), "--to", to)


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Copies a directory with `cp`; returns its seconds, and those until it is on the disk."""
    settle()
    start = time.perf_counter()
    subprocess.run([CP, "-r", str(source), str(target)], check=True)
    copied = time.perf_counter() - start
    for file in filter(Path.is_file, target.rglob("*")):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    synced = time.perf_counter() - start
    shutil.rmtree(target)
    return copied, synced


def measure(
    source: Path,
    names: tuple[str, str],
    turns: bool,
    copies: list[tuple[float, float]],
    repeat: int,
) -> Pair:
    """Converts and copies in turns; the last of `copies` is of just before, new ones are added."""
    target = source.parent / "target"
    conversions = []
    for _ in range(repeat):
        conversions.append(convert(source, target, names[1]))
        shutil.rmtree(target)
        copies.append(copy(source, target))
    seconds, peaks = zip(*conversions, strict=True)
    around = copies[-repeat - 1 :]
    cp, synced = (statistics.median(times) for times in zip(*around, strict=True))
    return Pair(*names, turns, statistics.median(seconds), cp, synced, max(peaks))


def pairs(preset: str, formats: list[str], repeat: int, directory: Path) -> Iterator[Pair]:
    """Measures every pair; each checkpoint is removed when it has served."""
    made, table = directory / "made", param_table(OPTConfig.preset(preset))
    python("-c", WRITE, str(made), preset)
    for first in formats:
        source = directory / "source"
        convert(made, source, first)
        copies = [copy(source, directory / "target")]
        for second in formats:
            dialects = [FORMATS[name].dialect for name in (first, second)]
            turns = any(len({d.transposed(param) for d in dialects}) > 1 for param in table)
            yield measure(source, (first, second), turns, copies, repeat)
        shutil.rmtree(source)


def show(found: list[Pair], formats: list[str], largest: int) -> None:
    """Prints the table of the docs."""
    cells = {(pair.source, pair.target): pair for pair in found}
    print("\nTimes cp (times cp that waits for the disk), peak of memory in MB beyond the largest")
    print(f"tensor ({largest / 1e6:.0f} MB):\n")
    print("| from \\ to |" + "".join(f" {name} |" for name in formats))
    print("|---|" + "---|" * len(formats))
    for first in formats:
        row = [cells[first, second] for second in formats]
        texts = (
            f"{p.seconds / p.cp:.1f} ({p.seconds / p.cp_synced:.1f}), {(p.peak - largest) / 1e6:.0f}"
            for p in row
        )
        print(f"| {first} |" + "".join(f" {text} |" for text in texts))


def main() -> int:
    """Measures what the arguments ask for; returns 1 if a figure is above its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="opt-1.3b", help="a published size (%(default)s)")
    parser.add_argument("--formats", nargs="+", choices=[*FORMATS], default=[*FORMATS])
    parser.add_argument("--repeat", type=int, default=1, help="conversions per pair (%(default)s)")
    parser.add_argument("--directory", help="where to make the temporary directory")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    sizes = [2 * math.prod(p.shape) for p in param_table(OPTConfig.preset(options.preset))]
    needed, free = (
        4 * sum(sizes),
        shutil.disk_usage(options.directory or tempfile.gettempdir()).free,
    )
    if needed > free:
        parser.error(f"expected {needed / 1e9:.1f} GB free, found {free / 1e9:.1f}: --directory")
    found = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for p in pairs(options.preset, options.formats, options.repeat, Path(directory)):
            found.append(p)
            print(
                f"{p.source:>17} -> {p.target:<17}{p.seconds:6.1f} s, cp {p.cp:.1f} s, with a wait "
                f"{p.cp_synced:.1f} s, peak {p.peak / 1e6:.0f} MB",
                flush=True,
            )
    show(found, options.formats, max(sizes))
    if options.json:
        content = {"preset": options.preset, "bytes": sum(sizes), "largest": max(sizes)}
        content["pairs"] = [asdict(p) for p in found]
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    fits = all(
        p.peak - max(sizes) <= ALLOWANCE and p.seconds <= p.limit * p.cp_synced for p in found
    )
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
