# SPDX-License-Identifier: Apache-2.0
"""The embedded model `opt-tiny-sums`, a real OPT checkpoint in 1 MB, and the task that it learnt."""

from __future__ import annotations

from pathlib import Path

TINY_SUMS = Path(__file__).parent / "opt-tiny-sums"
"""The directory to give to any `from_pretrained`."""
