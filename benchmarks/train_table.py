# SPDX-License-Identifier: Apache-2.0
"""Who takes part in `benchmarks/train.py`, and which ratios are aimed at: data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.contest import Program

SIZE = "opt-125m"
BATCH, LENGTH = 4, 256
#: Steps in one round, and steps without dropout whose losses are compared.
STEPS, COMPARED_STEPS = 4, 3
#: Largest difference of a loss, relative to the peer's, of who computes the same and of who rounds.
LIMIT, ROUNDED_LIMIT = 1e-4, 1e-2


@dataclass(frozen=True)
class Column:
    """Contestants beside each other, by name, whose first word is the group of theirs.

    Each program's last argument, the dropout, is added by `programs`.
    """

    title: str
    contestants: Mapping[str, Program]
    targets: Mapping[str, float]  # how many times faster than the fastest peer ours is to be
    dropout: float = 0.1

    def programs(self, dropout: float) -> dict[str, Program]:
        return {
            name: replace(program, arguments=(*program.arguments, str(dropout)))
            for name, program in self.contestants.items()
        }


#: What TF in transformers 4.57 needs: Keras 2.
_LEGACY = {"TF_USE_LEGACY_KERAS": "1"}
_FLAX = {
    "ours": Program("train_flax", ("ours",)),
    "transformers": Program("train_flax", ("transformers",), "hf457"),
}
COLUMNS: Mapping[str, Column] = {
    "torch": Column(
        "PyTorch, float32",
        {
            "ours": Program("train_torch", ("ours", "float32")),
            "ours bfloat16 products": Program("train_torch", ("ours", "lower"), exact=False),
            "transformers": Program("train_torch", ("transformers", "float32"), "hf5"),
        },
        {"ours": 1.0, "ours bfloat16 products": 1.8},
    ),
    "torch-autocast": Column(
        "PyTorch, bfloat16 autocast",
        {
            "ours": Program("train_torch", ("ours", "autocast"), exact=False),
            "transformers": Program("train_torch", ("transformers", "autocast"), "hf5"),
        },
        {"ours": 1.1},
    ),
    "tf": Column(
        "TensorFlow, `fit`",
        {
            "ours": Program("train_tf", ("ours", "xla"), variables={"KERAS_BACKEND": "tensorflow"}),
            "transformers": Program("train_tf", ("transformers", "xla"), "hf457", _LEGACY),
            "transformers graph": Program("train_tf", ("transformers", "graph"), "hf457", _LEGACY),
        },
        {"ours": 1.1},
    ),
    "flax": Column("JAX/Flax", _FLAX, {"ours": 1.8}),
    "flax-0": Column("JAX/Flax, without dropout", _FLAX, {"ours": 1.1}, dropout=0.0),
}
