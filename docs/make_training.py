# SPDX-License-Identifier: Apache-2.0
"""Draws docs/training.png from the logs of the three trainings from scratch.

python docs/make_training.py            # after `make train-sums`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # runs in a source tree, installed or not

from benchmarks.decode_table import TITLES

RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "training.png"
COLOURS = {"torch": "tab:orange", "tf": "tab:green", "flax": "tab:blue"}
SMOOTHED = 20  # steps that a point of the loss is the mean of


def log_of(framework: str) -> list[dict[str, Any]]:
    """What was noted after each step."""
    lines = (RESULTS / f"from_scratch_{framework}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_plot(path: Path) -> None:
    """Losses by steps, and held-out accuracies by steps and by minutes."""
    import matplotlib.pyplot as plt

    figure, (losses, by_steps, by_minutes) = plt.subplots(1, 3, figsize=(12, 3.2))
    for framework, colour in COLOURS.items():
        log, style = log_of(framework), {"color": colour, "label": TITLES[framework]}
        groups = [log[start : start + SMOOTHED] for start in range(0, len(log), SMOOTHED)]
        means = [sum(line["loss"] for line in group) / len(group) for group in groups]
        losses.plot([group[-1]["step"] for group in groups], means, **style)
        checks = [line for line in log if "accuracy" in line]
        shares = [100 * line["accuracy"] for line in checks]
        by_steps.plot([line["step"] for line in checks], shares, marker=".", **style)
        by_minutes.plot([line["seconds"] / 60 for line in checks], shares, marker=".", **style)
    losses.set(yscale="log", xlabel="steps", title="loss")
    by_steps.set(xlabel="steps", ylabel="%", title="held-out problems answered in full")
    by_minutes.set(xlabel="minutes", ylabel="%", title="held-out problems answered in full")
    losses.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    write_plot(PICTURE)
