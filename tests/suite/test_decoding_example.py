# SPDX-License-Identifier: Apache-2.0
"""The example that shows every way to decode."""

from __future__ import annotations

import sys

import pytest

from examples.decoding_strategies import FRAMEWORKS, STRATEGIES, main
from opt_core.generation.strategies import GenerationMode
from tests.backends.base import Backend

SUM = "ninety-six plus eighty-seven is| one hundred eighty-three\n"


def test_each_strategy_is_shown() -> None:
    modes = {mode.value.removesuffix("-beam") for mode in GenerationMode} - {"group"}
    assert set(STRATEGIES) == modes | {"group-beam"}


def test_the_model_adds(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    """All strategies but those that draw or force words; where compiling takes long, two of them."""
    names = set(STRATEGIES) - {"sample", "beam-sample", "constrained"}
    names = names if backend.runs_all_programs else {"greedy", "assisted"}
    main(["--backend", backend.name, *(f"--strategy={name}" for name in names)])
    shown = capsys.readouterr().out
    assert shown.count(SUM) == len(names) and all(STRATEGIES[n].what in shown for n in names)
    assert {f.package for f in FRAMEWORKS.values()} & set(sys.modules) == {backend.package.__name__}


def test_a_word_that_is_forced(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--backend", backend.name, "--strategy=constrained", "--force-word= twelve"])
    (text,) = (line.partition("|")[2] for line in capsys.readouterr().out.splitlines()[2:])
    assert " twelve" in text


def test_help_and_names_that_do_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--force-word" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["--strategy", "magic"])
    assert "invalid choice: 'magic'" in capsys.readouterr().err
