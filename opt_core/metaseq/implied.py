# SPDX-License-Identifier: Apache-2.0
"""What is in flat parameters whose metadata is lost, as in the files published in 2022.

The scripts of that time merged the shards of each model-parallel part and threw `shard_metadata`
away. The order is still known (metaseq issue 197 prints that of 175B), and the sizes must agree with
a configuration to the last element; if they do not, nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from opt_core.config import OPTConfig
from opt_core.errors import FormatError
from opt_core.metaseq.flat import Flat, Structure
from opt_core.metaseq.parts import FUSED, IN_FUSED
from opt_core.params import BASE_MODEL, param_table, projects_embeddings
from opt_core.presets import PRESETS

_ROOT = "flat_param_0"
_LAYER = re.compile(r"decoder\.layers\.\d+(?=\.)")

Shape = tuple[int, ...]


def imply_structure(
    stored: Mapping[str, Shape], parts: int, shards: int, config: OPTConfig | None, where: object
) -> Structure:
    """Return the structure of one model-parallel part whose flat parameters have these shapes.

    `config` is that of the whole model, `parts` the number of parts; without a config, the published
    sizes are tried. Raises FormatError if none fits, or if the files are not those parts.
    """
    if parts > 1 and shards == 1:
        for candidate in [config] if config else map(OPTConfig.preset, PRESETS):
            flats = _flats(candidate, parts)
            if {flat.key: (flat.size,) for flat in flats} == dict(stored):
                return Structure(flats)
    raise FormatError(
        f"{where}: expected shard_metadata to say what is in its flat parameters, found none, and "
        f"{len(stored)} flat parameters that are not those of "
        f"{'the config.json beside it' if config else 'a published size'} in {parts} parts. "
        f"{'Save it unflattened.' if config else 'Put the config.json of the model beside it.'}"
    )


def _flats(config: OPTConfig, parts: int) -> tuple[Flat, ...]:
    """Return one flat parameter per layer and one of the rest, in the order of metaseq's modules."""
    if projects_embeddings(config):
        return ()  # never published in parts
    groups: dict[str, dict[str, Shape]] = {_ROOT: {}}
    for param in param_table(config):
        name, shape = param.name.removeprefix(f"{BASE_MODEL}."), list(param.shape)
        dim = param.spec.split_dim()
        if dim is not None:
            if shape[dim] % parts:
                return ()
            shape[dim] //= parts
        module = param.module.rpartition(".")[2]
        if module in IN_FUSED:
            name, shape[0] = name.replace(module, FUSED), 3 * shape[0]
        layer = _LAYER.match(name)
        key = f"{layer[0]}.{_ROOT}" if layer else _ROOT
        groups.setdefault(key, {})[name] = tuple(shape)
    return tuple(Flat(key, tuple(group), tuple(group.values())) for key, group in groups.items())
