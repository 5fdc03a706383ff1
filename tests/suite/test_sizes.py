# SPDX-License-Identifier: Apache-2.0
"""The published sizes without memory: names and shapes of the framework's own modules."""

from __future__ import annotations

import math

import pytest

from opt_core import OPTConfig
from opt_core.params import ARCHITECTURES, param_table
from opt_core.presets import PRESETS
from tests.backends.base import Backend
from tests.cases import CASES, case

#: Scalars, the tied head counted once, 2050 rows of positions.
COUNTS = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
}


def test_every_size_is_counted() -> None:
    assert tuple(COUNTS) == PRESETS


@pytest.mark.parametrize("size", PRESETS)
def test_names_and_shapes_of_the_published_sizes(backend: Backend, size: str) -> None:
    config = OPTConfig.preset(size)
    found = backend.shapes(config)
    assert found == {param.name: param.shape for param in param_table(config)}
    assert sum(map(math.prod, found.values())) == COUNTS[size]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_shapes_of_every_option(backend: Backend, name: str, architecture: str) -> None:
    config = case(name).config
    table = param_table(config, architecture)
    found = backend.shapes(config, architecture=architecture)
    assert found == {param.name: param.shape for param in table}
