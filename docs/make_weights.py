# SPDX-License-Identifier: Apache-2.0
"""Writes docs/weights.md from the parameter table: `python docs/make_weights.py`, or `make docs`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from opt_core.config import OPTConfig
from opt_core.params import (
    AXES,
    CONVENTIONS,
    DECODER_PARAMS,
    FRAMEWORKS,
    HEAD_PARAMS,
    Kind,
    ParamSpec,
    num_parameters,
)
from opt_core.presets import PRESETS

PAGE = Path(__file__).parent / "weights.md"

INTRO = """\
# Weights

Written by `make docs` from `opt_core/params.py`; do not edit.

A checkpoint that opt-zoo saves, from whatever framework, has the names below and the layout (out, in)
for matrices: those of the PyTorch files on the hub. Inside a framework a parameter has the same path with
the framework's own leaf name, and where the table of conventions says so it is transposed.
"""
#: A configuration that has every parameter, and for each option the change that takes some away.
EVERYTHING = OPTConfig(word_embed_proj_dim=512, tie_word_embeddings=False)
WITHOUT = {
    "`word_embed_proj_dim` differs from `hidden_size`": {"word_embed_proj_dim": None},
    "`enable_bias`": {"enable_bias": False},
    "`layer_norm_elementwise_affine`": {"layer_norm_elementwise_affine": False},
    "`do_layer_norm_before`": {"do_layer_norm_before": False},
    "not `_remove_final_layer_norm`": {"_remove_final_layer_norm": True},
    "not `tie_word_embeddings`": {"tie_word_embeddings": True},
}


def conditions(spec: ParamSpec) -> str:
    """The options without which the parameter does not exist, found by trying each."""
    needed = [
        text for text, change in WITHOUT.items() if not spec.when(EVERYTHING.replace(**change))
    ]
    return " and ".join(needed) or "always"


def rows(specs: tuple[ParamSpec, ...]) -> Iterator[str]:
    """A table of parameters."""
    yield "| name | shape | present if |"
    yield "|---|---|---|"
    for spec in specs:
        shape = ", ".join(f"`{AXES[axis].origin}`" for axis in spec.axes)
        yield f"| `{spec.name}` | ({shape}) | {conditions(spec)} |"


def convention_rows() -> Iterator[str]:
    """A table of leaf names."""
    yield "| kind | " + " | ".join(FRAMEWORKS) + " |"
    yield "|---" * (len(FRAMEWORKS) + 1) + "|"
    for kind in Kind:
        cells = [CONVENTIONS[framework][kind] for framework in FRAMEWORKS]
        texts = [f"`{c.leaf}`" + (", transposed" if c.transposed else "") for c in cells]
        yield f"| {kind.value} | " + " | ".join(texts) + " |"


def size_rows() -> Iterator[str]:
    """A table of the published sizes."""
    yield "| size | layers | hidden | heads | word embedding | parameters |"
    yield "|---|---|---|---|---|---|"
    for name in PRESETS:
        c = OPTConfig.preset(name)
        yield (
            f"| {name} | {c.num_hidden_layers} | {c.hidden_size} | {c.num_attention_heads} "
            f"| {c.word_embed_proj_dim} | {num_parameters(c):,} |"
        )


def page() -> str:
    """The whole page."""
    lines = [INTRO, "## The decoder", "", *rows(DECODER_PARAMS), "", "## Heads"]
    for architecture, specs in HEAD_PARAMS.items():
        if specs:
            lines += ["", f"`{architecture}`:", "", *rows(specs)]
    lines += [
        "",
        "A tied head is the token embedding and is not stored. Row 1 of the position table is read at",
        "pads, row 0 never.",
        "",
        "## Conventions",
        "",
        *convention_rows(),
        "",
        "## Published sizes",
        "",
        *size_rows(),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
