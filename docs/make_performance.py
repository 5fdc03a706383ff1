# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/performance.md and README.md from what has been measured.

python docs/make_performance.py   # after `make bench-decode`, `bench-train`, `generation-memory`, `gpu`

What a run on a GPU left may come from another machine, and may be a part: there is a table for what is there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # runs in a source tree, installed or not

from benchmarks import decode_report, flash_report, gpu_jobs_report, train_report
from benchmarks.decode_report import Race, errors_table, job_table, peers_table, summary_table
from benchmarks.decode_table import JOBS, SIZES, TITLES
from benchmarks.gpu_case import Results
from benchmarks.gpu_report import machine as gpu_machine
from benchmarks.gpu_report import tests as gpu_tests
from benchmarks.gpu_table import JOBS as GPU_JOBS
from benchmarks.tables import markdown
from docs.make_numerics import BEGIN, replace_block

RESULTS = ROOT / "benchmarks" / "results"
#: Where `make gpu` writes.
GPU_RESULTS = RESULTS / "gpu"
GPU_PICTURE = "flash_attention.png"
PAGES = (ROOT / "docs" / "performance.md", ROOT / "README.md")


def hardware(found: Mapping[str, Any]) -> str:
    """What it was measured on."""
    environment = found["environment"]
    return (
        f"- {environment['processor']}, {environment['cores']} cores, "
        f"{environment['memory'] / 2**30:.0f} GiB, {environment['system']}, "
        f"Python {environment['python']}.\n"
    )


def versions(races: Iterable[Race | train_report.Race]) -> str:
    """Of whatever was measured."""
    found = {
        f"{name} {version}"
        for race in races
        for entry in race.entries.values()
        for name, version in entry.versions.items()
    }
    return f"- {', '.join(sorted(found))}.\n"


def machine(found: Mapping[str, Any]) -> str:
    """Where and how often decoding was measured."""
    races = decode_report.races_of(found)
    bandwidths = sorted(race.bandwidth / 1e9 for race in races)
    beside = max(found["beside"].values())
    return (
        f"{hardware(found)}"
        f"- Reading memory: {bandwidths[0]:.0f} to {bandwidths[-1]:.0f} GB/s.\n"
        f"- {found['rounds']} rounds. Beside the waiting others, ours took at most {beside:.2f} times "
        "as long as alone.\n"
        f"{versions(races)}"
    )


def training(found: Mapping[str, Any]) -> str:
    """Everyone who trained, and where."""
    races = train_report.races_of(found)
    rounds = f"- {found['rounds']} rounds.\n"
    return f"{train_report.table(races)}\n{hardware(found)}{rounds}{versions(races)}"


def details(races: Sequence[Race]) -> str:
    """Every job of every size: ours, then the peers."""
    parts = []
    for size in dict.fromkeys(race.size for race in races):
        for job, what in JOBS.items():
            chosen = [race for race in races if (race.size, race.job) == (size, job)]
            if chosen:
                parts += [
                    f"### {size}: {what.title}\n",
                    job_table(chosen, job),
                    peers_table(chosen),
                ]
    return "\n".join(parts)


def memory(cases: Sequence[Mapping[str, Any]]) -> str:
    """Peaks and limits of generating, in megabytes."""
    rows = [["framework", "batch", "weights", "peak, MB", "limit, MB"]]
    for case in cases:
        weights = "prepared" if case["prepared"] else "as loaded"
        peak = f"{case['peak'] / 1e6:.0f}" + ("" if case["within"] else ", above")
        limit = f"{case['limit'] / 1e6:.0f}"
        rows.append([TITLES[case["framework"]], str(case["batch"]), weights, peak, limit])
    return markdown(rows)


def gpu_results(folder: Path) -> Results | None:
    """What was measured on a GPU, if anything was; a trial on a CPU is nothing."""
    path = folder / "gpu.json"
    results = Results.read(path) if path.exists() else None
    return results if results and "cuda" in results.environment else None


def gpu(folder: Path) -> dict[str, str]:
    """The block of what was measured on a GPU; none, so that the page stays as it is, if nothing was."""
    results = gpu_results(folder)
    if results is None:
        return {}
    parts = [f"{gpu_tests(results)}{gpu_jobs_report.card(results)}{gpu_machine(results)}"]
    for section, job in GPU_JOBS.items():
        if cases := results.of(section):
            parts += [f"### On a GPU: {job.title}, {job.dtype}\n"]
            if section == "inference":
                if (folder / GPU_PICTURE).exists():
                    link = f"../{(folder / GPU_PICTURE).relative_to(ROOT).as_posix()}"
                    parts += [f"![Speed-ups over plain operations]({link})\n"]
                parts += [flash_report.report(cases)]
            else:
                parts += [gpu_jobs_report.report(results, cases)]
    return {"gpu": "\n".join(parts)}


def blocks() -> dict[str, str]:
    """The text of each block by its name."""
    found = json.loads((RESULTS / "decode.json").read_text())
    races = decode_report.races_of(found)
    return {
        "machine": machine(found),
        "decoding": summary_table(races),
        "decoding in short": summary_table([race for race in races if race.size == SIZES[0]]),
        "errors": errors_table(races),
        "details": details(races),
        "training": training(json.loads((RESULTS / "train.json").read_text())),
        "memory": memory(json.loads((RESULTS / "generation_memory.json").read_text())),
        **gpu(GPU_RESULTS),
    }


def pages() -> dict[Path, str]:
    """Every page with its blocks filled in."""
    contents = blocks()
    texts = {}
    for page in PAGES:
        text = page.read_text("utf-8")
        for name, content in contents.items():
            if BEGIN.format(name) in text:
                text = replace_block(text, name, content)
        texts[page] = text
    return texts


def main() -> None:
    results = gpu_results(GPU_RESULTS)
    if results and results.of("inference"):
        flash_report.write_plot(results.of("inference"), GPU_RESULTS / GPU_PICTURE)
    for page, text in pages().items():
        page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
