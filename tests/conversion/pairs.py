# SPDX-License-Identifier: Apache-2.0
"""Every pair of formats, there and back; the table in docs/conversion.md is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from conversion import convert
from opt_core.checkpoints import CheckpointReader
from opt_core.formats import FORMATS

MODELS = ("pre_norm", "post_norm")
SIZES = ("5GB", "5KB")  # one file, and shards
DTYPES = ("float32", "float16", "bfloat16")
START, END = "<!-- pairs: made by docs/make_conversion.py -->", "<!-- end of pairs -->"


def bits(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint as it lies there: name, dtype, shape, bytes."""
    with CheckpointReader.open(directory) as reader:
        return {
            name: (str(tensor.dtype), tensor.shape, np.ascontiguousarray(tensor.read()).tobytes())
            for name, tensor in reader.items()
        }


def there_and_back(
    source: Path, first: str, dtype: str, size: str, folder: Path
) -> Iterator[tuple[str, bool]]:
    """Converts a model to the format `first`, from there to each format, and from each back.

    Gives the name of each format, and whether what came back has the same names and bits.
    """
    convert(source, folder / "first", to=first, dtype=dtype, max_shard_size=size)
    expected = bits(folder / "first")
    for second in FORMATS:
        convert(folder / "first", folder / second, to=second, max_shard_size=size)
        convert(folder / second, folder / f"{second}-back", to=first, max_shard_size=size)
        yield second, bits(folder / f"{second}-back") == expected


def table(equal: dict[tuple[str, str], int]) -> str:
    """The table of the docs: how many models and dtypes were bit-equal for each pair."""
    head = "| from, over, and back |" + "".join(f" {name} |" for name in FORMATS)
    lines = [head, "|---|" + "---|" * len(FORMATS)]
    for first in FORMATS:
        cells = "".join(f" {equal[first, second]} |" for second in FORMATS)
        lines.append(f"| {first} |{cells}")
    return "\n".join([START, "", *lines, "", END])
