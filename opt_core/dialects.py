# SPDX-License-Identifier: Apache-2.0
"""How checkpoints of different origin spell the parameter table, as data.

A dialect is recognised by its names alone, and they say how the tensors are laid out; what a file's
metadata claims about its framework is not consulted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product

from opt_core.errors import CheckpointError
from opt_core.params import BASE_MODEL, CONVENTIONS, EMBEDDING_NAME, Kind, Param


@dataclass(frozen=True)
class Dialect:
    """One way to spell the table's names.

    Attributes:
        framework: gives the layout, and the leaf names unless `leaves` does.
        separator: between the parts of a name.
        layer: the number of a layer -> how the list and the layer in it are spelt.
        suffix: at the end of each name.
        scopes: what the names of a file may all begin with, the usual first.
        keeps_base: whether the names of a bare base model begin with `model` too.
        roots: attribute of a model -> its spelling, where that is another.
        leaves: kind, or name of a module -> leaf names, the usual first.
        modules: name of a module in its parent -> an older name of the module.
        dropped: patterns of names that are left out on purpose, unless nothing else spells a
            parameter.
    """

    framework: str
    separator: str = "."
    layer: Callable[[int], str] = "layers.{}".format
    suffix: str = ""
    scopes: tuple[str, ...] = ("",)
    keeps_base: bool = False
    roots: Mapping[str, str] = field(default_factory=dict)
    leaves: Mapping[Kind | str, tuple[str, ...]] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def name(self, param: Param, architecture: str) -> str:
        """The name under which a file of a model of that class stores the parameter."""
        whole, *others = self.spellings(param)
        bare = param.in_base_model and architecture == "OPTModel" and not self.keeps_base
        return others[0] if bare else whole

    def spellings(self, param: Param) -> tuple[str, ...]:
        """Every name under which this dialect's files have stored the parameter, usual one first.

        Each is followed by that without the leading `model`, as files of a bare base model have it.
        """
        *parents, last = param.module.split(".")
        kind = param.spec.kind
        leaf = CONVENTIONS[self.framework][kind].leaf
        leaves = self.leaves.get(last, self.leaves.get(kind, (leaf,)))
        ends = [(last, name) for name in leaves]
        older = self.modules.get(".".join([*parents[-1:], last]))
        if older is not None:
            ends.append((older, leaf))
        starts = (parents, parents[1:]) if param.in_base_model else (parents,)
        return tuple(
            scope + self._join([*start, *end])
            for scope, end, start in product(self.scopes, ends, starts)
        )

    def _join(self, parts: list[str]) -> str:
        root = self.roots.get(parts[0], parts[0])
        name = self.separator.join([root, *parts[1:]]) + self.suffix
        layers = rf"layers{re.escape(self.separator)}(\d+)"
        return re.sub(layers, lambda match: self.layer(int(match[1])), name)

    def transposed(self, param: Param) -> bool:
        """Whether the tensor is stored transposed with respect to the canonical layout."""
        return param.transposed(self.framework)

    def drops(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.dropped)


def _keras_layer(number: int) -> str:
    return f"layers/opt_decoder_layer_{number}" if number else "layers/opt_decoder_layer"


DIALECTS = {
    "pt": Dialect(
        "torch",
        keeps_base=True,
        modules={  # names of the first conversions from metaseq
            "decoder.project_in": "project_in_dim",
            "decoder.project_out": "project_out_dim",
            "decoder.final_layer_norm": "layer_norm",
            "lm_head": "decoder.output_projection",
        },
        dropped=(r"(model\.)?decoder\.version", r"(model\.)?decoder\.output_projection\.weight"),
    ),
    "tf": Dialect(
        "tf",
        separator="/",
        suffix=":0",
        keeps_base=True,
        leaves={  # files from before transformers 4.34 name the position table's leaf "weight"
            "embed_tokens": ("weight",),
            "embed_positions": ("embeddings", "weight"),
        },
    ),
    "flax": Dialect("flax", scopes=("", "params.", "params.params.")),
    "keras": Dialect(  # the files of `save_weights`: classes of layers, not their names
        "tf",
        separator="/",
        layer=_keras_layer,
        roots={
            BASE_MODEL: "layers/tfopt_model",
            "lm_head": "layers/linear",
            "score": "layers/linear",
            "qa_outputs": "layers/linear",
        },
        leaves={
            Kind.LINEAR: ("vars/0",),
            Kind.BIAS: ("vars/1",),
            Kind.EMBEDDING: ("vars/0",),
            Kind.NORM_SCALE: ("vars/0",),
            Kind.NORM_BIAS: ("vars/1",),
        },
        dropped=(r"optimizer/.*", r"(.*/)?decoder/vars/0"),  # moments, and dropout's seeds
    ),
}


def recognise(names: Iterable[str], embedding: Param) -> Dialect:
    """The dialect in which the names are spelt, told by the token embedding.

    Raises:
        CheckpointError: no dialect spells the embedding so; says which names were looked for.
    """
    present = set(names)
    for dialect in DIALECTS.values():
        if present.intersection(dialect.spellings(embedding)):
            return dialect
    looked_for = [dialect.spellings(embedding)[0] for dialect in DIALECTS.values()]
    raise CheckpointError(
        f"No OPT checkpoint: expected the token embedding under one of {looked_for}, found "
        f"{sorted(present)[:5] or 'no tensors'}. Is it a checkpoint of another model? "
        f"(canonical name: {EMBEDDING_NAME})"
    )
