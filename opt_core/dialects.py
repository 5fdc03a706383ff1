# SPDX-License-Identifier: Apache-2.0
"""How checkpoints of different origin spell the parameter table, as data.

A dialect is recognised by its names alone, and a name's last part (`weight`, `kernel`) says how the
tensor is laid out; what a file's metadata claims about its framework is not consulted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from opt_core.errors import CheckpointError
from opt_core.params import BASE_MODEL, CONVENTIONS, EMBEDDING_NAME, Param


@dataclass(frozen=True)
class Dialect:
    """One way to spell the table's names; `framework` gives the leaf names and the layout."""

    name: str
    framework: str
    separator: str = "."
    layer_separator: str = "."  # in `layers.0`
    suffix: str = ""
    leaves: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # module -> other leaf names
    modules: Mapping[str, str] = field(default_factory=dict)  # module -> older name of the module
    dropped: tuple[str, ...] = ()  # patterns of names that are left out on purpose

    def spellings(self, param: Param) -> tuple[str, ...]:
        """Every name under which this dialect's files have stored the parameter, usual one first.

        Files of a bare base model lack the leading `model`.
        """
        *parents, last = param.module.split(".")
        leaf = CONVENTIONS[self.framework][param.spec.kind].leaf
        leaves = self.leaves.get(last, (leaf,))
        names = [(last, name) for name in leaves]
        if ".".join([*parents[-1:], last]) in self.modules:
            names.append((self.modules[".".join([*parents[-1:], last])], leaf))
        prefixes = (parents, parents[1:]) if parents[:1] == [BASE_MODEL] else (parents,)
        return tuple(self._join([*prefix, *name]) for name in names for prefix in prefixes)

    def _join(self, parts: list[str]) -> str:
        name = self.separator.join(parts) + self.suffix
        return re.sub(
            rf"layers{re.escape(self.separator)}(\d+)", rf"layers{self.layer_separator}\1", name
        )

    def transposed(self, param: Param) -> bool:
        """Whether the tensor is stored transposed with respect to the canonical layout."""
        return param.transposed(self.framework)

    def drops(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.dropped)


DIALECTS = (
    Dialect(
        "pt",
        "torch",
        modules={  # names of the first conversions from metaseq
            "decoder.project_in": "project_in_dim",
            "decoder.project_out": "project_out_dim",
            "decoder.final_layer_norm": "layer_norm",
        },
        dropped=(r"(model\.)?decoder\.version", r"(model\.)?decoder\.output_projection\.weight"),
    ),
    Dialect(
        "tf",
        "tf",
        separator="/",
        suffix=":0",
        leaves={  # files from before transformers 4.34 name the position table's leaf "weight"
            "embed_tokens": ("weight",),
            "embed_positions": ("embeddings", "weight"),
        },
    ),
    Dialect("flax", "flax"),
)


def recognise(names: Iterable[str], embedding: Param) -> Dialect:
    """The dialect in which the names are spelt, told by the token embedding.

    Raises:
        CheckpointError: no dialect spells the embedding so; says which names were looked for.
    """
    present = set(names)
    for dialect in DIALECTS:
        if present.intersection(dialect.spellings(embedding)):
            return dialect
    looked_for = [dialect.spellings(embedding)[0] for dialect in DIALECTS]
    raise CheckpointError(
        f"No OPT checkpoint: expected the token embedding under one of {looked_for}, found "
        f"{sorted(present)[:5] or 'no tensors'}. Is it a checkpoint of another model? "
        f"(canonical name: {EMBEDDING_NAME})"
    )
