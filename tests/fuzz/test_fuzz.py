# SPDX-License-Identifier: Apache-2.0
"""Hostile files in the normal suite: a small share of what `make fuzz` does, the same each time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opt_core.checkpoints import CheckpointReader, LazyTensor
from opt_core.errors import FormatError
from tests.fuzz import targets
from tests.fuzz.inputs import Input, draw, placed, scratch
from tests.fuzz.limits import SECONDS, TooSlowError, limited
from tests.fuzz.seeds import Seed, all_seeds
from tests.fuzz.targets import READ, TARGETS, examine

#: Readers of one file, whose smallest seed is cut at each byte.
SINGLE = ("safetensors", "torch-zip", "torch-legacy", "torch-objects", "hdf5", "msgpack", "config")
#: Where (as a part of the length), how many bytes are left out, and what comes in their place.
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=5
)


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder in memory."""
    with scratch() as folder:
        yield folder


def outcome(folder: Path, seed: Seed, files: dict[str, bytes]) -> str:
    with placed(folder, seed, files) as path:
        return examine(seed.reader, path)


def smallest(reader: str) -> Seed:
    return min(all_seeds()[reader], key=lambda seed: sum(map(len, seed.files.values())))


@pytest.mark.parametrize("reader", TARGETS)
def test_seeds_can_be_read(reader: str, memory: Path) -> None:
    """Without this, all that follows would test the first few checks of a reader."""
    outcomes = [outcome(memory, seed, dict(seed.files)) for seed in all_seeds()[reader]]
    wanted = {"nested": 0.5, "metaseq": 0.5}.get(reader, 1)
    assert outcomes.count(READ) >= wanted * len(outcomes), outcomes


@pytest.mark.parametrize("reader", SINGLE)
def test_cut_at_every_byte(reader: str, memory: Path) -> None:
    seed = smallest(reader)
    ((name, data),) = seed.files.items()
    for length in range(len(data)):
        found = outcome(memory, seed, {name: data[:length]})
        assert found != READ or not data[length:].strip(), length  # a line's end may be missing


@pytest.mark.parametrize("reader", TARGETS)
def test_damaged(reader: str, memory: Path) -> None:
    for number in range(60 if reader == "orbax" else 300):
        made: Input = draw(0, number, (reader,))
        outcome(memory, made.seed, dict(made.files))


@given(reader=st.sampled_from(list(TARGETS)), edits=EDITS, number=st.integers(0, 10**6))
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_edit(
    reader: str, edits: list[tuple[float, int, bytes]], number: int, memory: Path
) -> None:
    """Bytes replaced, put in and left out; hypothesis makes a failure small."""
    seeds = all_seeds()[reader]
    seed = seeds[number % len(seeds)]
    name = seed.targets[number % len(seed.targets)]
    data = seed.files[name]
    for where, length, new in edits:
        place = int(where * len(data))
        data = data[:place] + new + data[place + length :]
    outcome(memory, seed, {**seed.files, name: data})


@given(data=st.binary(max_size=300), reader=st.sampled_from(SINGLE))
@settings(max_examples=200, deadline=None)
def test_any_bytes(data: bytes, reader: str) -> None:
    seed = Seed("any", reader, {"file": data}, "file")
    with scratch() as folder:
        assert outcome(folder, seed, {"file": data}) != READ or reader == "config"


def test_an_input_follows_from_its_number() -> None:
    assert draw(1, 7, tuple(TARGETS)) == draw(1, 7, tuple(TARGETS))
    assert draw(1, 7, tuple(TARGETS)).files != draw(1, 8, tuple(TARGETS)).files


# --- what the harness itself must notice --------------------------------------------------------


def _endless() -> None:
    while True:
        pass


def _large() -> None:
    np.zeros(2**29, np.uint8)


def _warns() -> None:
    np.float32(1e30) * np.float32(1e30)


@pytest.mark.parametrize(
    ("action", "error"),
    [(_endless, TooSlowError), (_large, MemoryError), (_warns, RuntimeWarning)],
)
def test_limits_hold(action: Callable[[], None], error: type[BaseException]) -> None:
    assert SECONDS == 2
    with pytest.raises(error), limited():
        action()
    np.zeros(2**29, np.uint8)  # and only there


def test_other_values_are_noticed(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LazyTensor.read
    monkeypatch.setattr(LazyTensor, "read", lambda tensor: whole(tensor) * 0)
    for reader in ("safetensors", "msgpack", "torch-zip", "hdf5"):
        seed = smallest(reader)
        with pytest.raises(targets.WrongError):
            outcome(memory, seed, dict(seed.files))


def test_more_than_the_file_holds_is_noticed(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that believes a header."""
    large = LazyTensor.from_array("large", np.zeros(10_000, np.float32))
    monkeypatch.setattr(CheckpointReader, "__getitem__", lambda reader, name: large)
    for reader in ("safetensors", "msgpack", "torch-zip", "hdf5"):
        seed = smallest(reader)
        with pytest.raises(targets.WrongError, match="40000 bytes in files of"):
            outcome(memory, seed, dict(seed.files))


def test_our_errors_are_outcomes(memory: Path) -> None:
    seed = smallest("safetensors")
    assert outcome(memory, seed, dict.fromkeys(seed.files, b"{}")) == FormatError.__name__


def test_the_long_run(tmp_path: Path) -> None:
    command = "-m tests.fuzz.run --inputs 300 --jobs 2 --seed 5 --readers config index"
    done = subprocess.run(
        [sys.executable, *command.split(), f"--findings={tmp_path}"],
        capture_output=True,
        check=False,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["inputs"], result["findings"]) == (300, 0)
    assert result["outcomes"].keys() == {"config", "index"}
    assert not list(tmp_path.iterdir())
