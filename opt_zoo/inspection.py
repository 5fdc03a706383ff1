# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, and how that compares with the parameter table of its configuration."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from conversion import Checkpoint, open_checkpoint
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError
from opt_core.loading import LoadReport, match

#: The fields of the configuration that make a size.
SUMMARY = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_dim",
    "word_embed_proj_dim",
    "vocab_size",
    "max_position_embeddings",
    "activation_function",
    "do_layer_norm_before",
    "enable_bias",
    "layer_norm_elementwise_affine",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Inspection:
    """A checkpoint described; everything but the values."""

    directory: str
    format: str
    files: dict[str, int]  # name -> bytes
    metadata: dict[str, str]
    architecture: str | None  # None without a config.json
    assumption: str | None  # why the architecture is a guess
    config: dict[str, Any] | None
    dtypes: dict[str, int]  # name -> number of tensors
    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]  # name, dtype, shape, bytes
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]  # an explanation each
    problem: str | None  # why it could not be compared with the table at all

    @property
    def num_parameters(self) -> int:
        """Scalars in the files; a tied head that is stored twice counts twice."""
        return sum(math.prod(shape) for _, _, shape, _ in self.tensors)

    @property
    def fits(self) -> bool:
        """Whether `from_pretrained` will take it without complaint, as far as can be told."""
        return not (self.missing or self.unexpected or self.mismatched or self.problem)


def inspect_checkpoint(source: str | os.PathLike[str]) -> Inspection:
    """Describes a directory, a file of weights, an index or a hub name; raises OPTError."""
    with open_checkpoint(source) as checkpoint:
        reader = checkpoint.reader
        report, problem = _compare(checkpoint)
        return Inspection(
            directory=str(checkpoint.directory),
            format=reader.format,
            files={file.name: file.stat().st_size for file in reader.files},
            metadata=reader.metadata,
            architecture=checkpoint.architecture if checkpoint.config else None,
            assumption=checkpoint.assumption,
            config=_summary(checkpoint.config),
            dtypes=dict(Counter(str(tensor.dtype) for tensor in reader.values())),
            tensors=tuple(
                (name, str(t.dtype), t.shape, t.info.nbytes) for name, t in reader.items()
            ),
            missing=(*report.missing, *report.missing_head),
            unexpected=(*report.unexpected, *report.other_heads),
            mismatched=report.mismatched,
            problem=problem,
        )


def _compare(checkpoint: Checkpoint) -> tuple[LoadReport, str | None]:
    if checkpoint.config is None:
        return LoadReport(), "There is no config.json, so nothing says what should be there."
    try:
        return match(checkpoint.config, checkpoint.architecture, checkpoint.reader)[1], None
    except CheckpointError as error:
        return LoadReport(), str(error)


def _summary(config: OPTConfig | None) -> dict[str, Any] | None:
    return None if config is None else {name: config.get(name) for name in SUMMARY}
