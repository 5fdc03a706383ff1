# SPDX-License-Identifier: Apache-2.0
"""How many programs `generate` compiles, and that they are freed. PyTorch compiles none."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opt_core.programs import DEFAULT_LIMIT, clear_compiled, count_programs, set_program_limit
from tests.backends.base import Backend
from tests.cases import case

PROMPT = [[5, 6, 7]]
#: Options that say the same in another way, or to another number of tokens.
ALIKE: dict[str, list[dict[str, Any]]] = {
    "greedy": [
        {"eos_token_id": 9},
        {"eos_token_id": 11, "pad_token_id": 3},
        {"max_new_tokens": 5},
    ],
    "processors": [
        {"suppress_tokens": [8, 9], "bad_words_ids": [[4, 5]], "repetition_penalty": 1.2},
        {"suppress_tokens": [4, 7], "bad_words_ids": [[7, 9]], "repetition_penalty": 1.4},
    ],
    "beams": [
        {"num_beams": 2, "length_penalty": 0.5},
        {"num_beams": 2, "length_penalty": 2.0, "eos_token_id": 12},
    ],
}


@pytest.fixture(autouse=True)
def no_programs() -> Iterator[None]:
    clear_compiled()
    yield
    set_program_limit(DEFAULT_LIMIT)


def generate(model: Any, **options: Any) -> Any:
    given = {"max_new_tokens": 3, "eos_token_id": 2, "pad_token_id": 1, **options}
    return model.generate(PROMPT, **given)


def made(backend: Backend, number: int) -> int:
    """So many programs, where there are such."""
    return 0 if backend.name == "torch" else number


@pytest.mark.parametrize("kind", ALIKE)
def test_what_changes_no_shape_compiles_nothing(backend: Backend, kind: str) -> None:
    model = backend.load(case("pre_norm").folder)
    for options in ALIKE[kind]:
        generate(model, **options)
    assert count_programs() == made(backend, 1)


def test_freed_with_their_model(backend: Backend) -> None:
    first, second = (backend.load(case(name).folder) for name in ("pre_norm", "post_norm"))
    generate(first)
    generate(second)
    assert count_programs() == made(backend, 2)
    del first
    gc.collect()
    assert count_programs() == made(backend, 1)
    second.clear_compiled()
    assert count_programs() == 0
    generate(second)
    assert count_programs() == made(backend, 1)


def test_no_more_than_the_limit_and_the_same_again(backend: Backend) -> None:
    set_program_limit(2)
    model = backend.load(case("pre_norm").folder)
    calls: list[dict[str, Any]] = [{}, {"suppress_tokens": [5]}, {"max_new_tokens": 33}, {}]
    found = [backend.generate(model, PROMPT, eos_token_id=None, **call) for call in calls]
    assert count_programs() == made(backend, 2)
    assert (found[0] == found[-1]).all()


def test_an_assistant_keeps_its_own(backend: Backend) -> None:
    assistant = backend.load(case("pre_norm").folder, attn_implementation="sdpa")
    model = backend.load(case("pre_norm").folder, attn_implementation="eager")
    generate(model, assistant_model=assistant)
    count = count_programs()
    if backend.name != "torch":
        assert len(model.programs) >= 2 and len(assistant.programs) >= 2
    generate(model, assistant_model=assistant, eos_token_id=9)
    assert count_programs() == count


@pytest.mark.slow
def test_400_calls_level_off(backend: Backend) -> None:
    """Of twelve models: memory maps, of which Linux gives a process 65,530, and bytes."""
    if backend.name == "torch":
        return  # compiles nothing
    done = subprocess.run(
        [sys.executable, "-m", "tests.many_calls", backend.name],
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    marks = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    (maps, bytes_), (later_maps, later_bytes) = marks[len(marks) // 2], marks[-1]
    assert max(maps for maps, _ in marks) < 40_000
    assert later_maps < 1.25 * maps
    if backend.name == "flax":  # TensorFlow keeps the graphs of what it has once compiled
        assert later_bytes < 1.25 * bytes_
