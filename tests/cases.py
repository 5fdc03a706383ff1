# SPDX-License-Identifier: Apache-2.0
"""The golden files as the tests use them; tests/golden/README.md says what is in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from opt_core import OPTConfig

Array = NDArray[Any]

GOLDEN = Path(__file__).parent / "golden"
CASES = tuple(sorted(path.parent.name for path in (GOLDEN / "cases").glob("*/case.json")))
MODELS = ("pre_norm", "post_norm")  # of GOLDEN / "formats"
INPUTS = frozenset({"input_ids", "attention_mask", "head_mask", "inputs_embeds", "labels"})
PADDINGS = ("unpadded", "left", "right", "mixed")


@dataclass(frozen=True)
class Case:
    """One tiny model, and what the reference computes with it."""

    name: str
    folder: Path
    config: OPTConfig
    weights: dict[str, Array]
    arrays: dict[str, Array]  # situation/quantity
    facts: dict[str, Any]

    def inputs(self, situation: str) -> dict[str, Array]:
        """The arguments of the call."""
        return {k: v for k, v in self._all(situation).items() if k in INPUTS}

    def outputs(self, situation: str) -> dict[str, Any]:
        """What the call returned: arrays, lists of them, for past_key_values a list of pairs."""
        found: dict[str, Any] = {}
        for key, value in self._all(situation).items():
            name, *rest = key.split("/")
            if name in INPUTS | {"base", "float16", "bfloat16"}:
                continue
            if not rest:
                found[name] = value
            elif len(rest) == 1:
                found.setdefault(name, []).append(value)
            elif rest[1] == "key":
                pair = (value, self.arrays[f"{situation}/{name}/{rest[0]}/value"])
                found.setdefault(name, []).append(pair)
        return found

    def real(self, situation: str) -> Array:
        """[B, T] true at real tokens."""
        mask = self._all(situation).get("attention_mask")
        return np.ones((3, 7), bool) if mask is None else mask == 1

    def _all(self, situation: str) -> dict[str, Array]:
        start = f"{situation}/"
        return {k.removeprefix(start): v for k, v in self.arrays.items() if k.startswith(start)}


@cache
def case(name: str) -> Case:
    """A golden case by name, read once; nobody writes into its arrays."""
    folder = GOLDEN / "cases" / name
    with np.load(folder / "outputs.npz") as file:
        arrays = dict(file)
    for array in arrays.values():
        array.setflags(write=False)
    return Case(
        name,
        folder,
        OPTConfig.from_json_file(folder / "config.json"),
        load_file(folder / "model.safetensors"),
        arrays,
        json.loads((folder / "case.json").read_text()),
    )


def write(folder: Path, weights: dict[str, Array], config: OPTConfig) -> Path:
    """Writes a checkpoint of these tensors."""
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    return folder


def bits(weights: dict[str, Array]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Arrays for an exact comparison."""
    return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in weights.items()}
