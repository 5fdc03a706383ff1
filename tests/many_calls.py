# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.many_calls BACKEND`: 400 calls of `generate`, a program each; for test_programs.py.

Prints memory maps and resident megabytes after every forty.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from itertools import islice, product
from pathlib import Path
from typing import Any

from opt_core import OPTConfig

CALLS = 400
STRATEGIES: tuple[dict[str, Any], ...] = (
    {},
    {"do_sample": True, "seed": 1},
    {"num_beams": 2},
    {"penalty_alpha": 0.6, "top_k": 2},
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": [5]},
    {"return_dict_in_generate": True},
)
SIZES = (1, 2, 3, 4, 5)  # of batches


def config_of(number: int) -> OPTConfig:
    """Another model for each number."""
    return OPTConfig(
        vocab_size=61 + number,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=64,
    )


def now() -> tuple[int, int]:
    """Memory maps, and resident megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    return maps, pages * os.sysconf("SC_PAGESIZE") >> 20


def main(backend: str) -> None:
    warnings.simplefilter("ignore")
    package = importlib.import_module(f"opt_{backend}")
    cls = getattr(package, {"tf": "TF", "flax": "Flax"}[backend] + "OPTForCausalLM")
    models = [cls(config_of(number)) for number in range(12)]
    calls = islice(product(STRATEGIES, SIZES, models), CALLS)
    for index, (options, rows, model) in enumerate(calls, 1):
        model.generate([[3, 4, 5]] * rows, max_new_tokens=4, **options)
        if index % 40 == 0:
            print(*now(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
