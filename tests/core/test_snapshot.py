# SPDX-License-Identifier: Apache-2.0
"""What one call reads of a directory is one state of it, though others save into it meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion import compare, convert, open_checkpoint, plan
from opt_core import CheckpointError, FormatError, OPTTokenizer, snapshot
from opt_core.assets import TINY_SUMS
from opt_core.checkpoints import LazyTensor
from opt_core.checkpoints.reader import CheckpointReader
from opt_core.files import atomic_write
from opt_core.pretrained import open_pretrained
from opt_core.snapshot import read_together
from opt_core.staging import COMPLETE, staged
from opt_zoo.inspection import inspect_checkpoint
from tests.faults.jobs import ARCHITECTURE, MODELS, make, save

Read = Callable[[Path], str]


def named_by_weights(tensors: dict[str, np.ndarray]) -> str:
    (value,) = {float(number) for array in tensors.values() for number in np.unique(array)}
    return next(name for name, number in MODELS.items() if number == value)


def loaded(directory: Path) -> str:
    """Which model `from_pretrained` finds: all that it reads must agree."""
    with open_pretrained(directory, ARCHITECTURE) as found:
        weights = {name: source.tensor.read() for name, source in found.sources.items()}
    name = named_by_weights(weights)
    assert found.config.num_hidden_layers == MODELS[name]
    assert found.generation_config.max_length == 10 + MODELS[name]
    return name


def opened(directory: Path) -> str:
    """Which model a conversion opens."""
    with open_checkpoint(directory, None, ["generation_config.json"]) as found:
        name = named_by_weights({name: tensor.read() for name, tensor in found.reader.items()})
    assert found.config is not None and found.config.num_hidden_layers == MODELS[name]
    assert json.loads(found.texts["generation_config.json"])["max_length"] == 10 + MODELS[name]
    return name


def inspected(directory: Path) -> str:
    found = inspect_checkpoint(directory)
    assert found.config is not None and found.fits, found.problems
    return next(n for n, k in MODELS.items() if k == found.config["num_hidden_layers"])


READERS: dict[str, tuple[str, Read]] = {
    "loading": ("opt_core.pretrained.find_config", loaded),
    "converting": ("conversion.checkpoint.find_config", opened),
    "inspecting": ("opt_zoo.inspection.find_config", inspected),
}


def open_files() -> int:
    """How many files this process has open; 0 where the system does not tell."""
    here = Path("/proc/self/fd")
    return len([*here.iterdir()]) if here.is_dir() else 0


def meanwhile(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], Any]) -> None:
    """Has somebody act just before a function is called."""
    module, _, attribute = name.rpartition(".")
    owner = import_module(module)
    function = getattr(owner, attribute)

    def acting(*arguments: Any, **options: Any) -> Any:
        act()
        return function(*arguments, **options)

    monkeypatch.setattr(owner, attribute, acting)


@pytest.mark.parametrize("kind", READERS)
def test_a_save_between_the_weights_and_the_configuration(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, read = READERS[kind]
    model = make(tmp_path / "model", "old")
    todo = ["new", "old", "new"]
    meanwhile(monkeypatch, place, lambda: todo and save(str(model), todo.pop()))
    assert read(model) == "new" and not todo


@pytest.mark.parametrize("kind", READERS)
def test_a_directory_that_never_rests(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, read = READERS[kind]
    model = make(tmp_path / "model", "old")
    monkeypatch.setattr(snapshot, "PAUSES", (0.0,) * 4)
    saves: list[None] = []
    meanwhile(monkeypatch, place, lambda: (saves.append(None), save(str(model), "new")))
    before = open_files()
    with pytest.raises(
        CheckpointError, match="changed during each of 4 tries: another process sav"
    ):
        read(model)
    assert len(saves) == 4
    assert open_files() == before


def test_a_tokenizer_between_two_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabulary and merges, once of two states: the tokens of the one, joined as in the other."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copy(TINY_SUMS / name, model)
    other = json.loads((model / "vocab.json").read_text())
    other["a"], other["b"] = other["b"], other["a"]
    once = [json.dumps(other)]

    def change() -> None:
        if once:
            with staged(model, obsolete=lambda name: False) as folder:
                (folder / "vocab.json").write_text(once.pop())

    meanwhile(monkeypatch, "opt_core.tokenizer_files._read_merges", change)
    found = OPTTokenizer.from_pretrained(model).get_vocab()
    assert not once and (found["a"], found["b"]) == (other["a"], other["b"])


def test_what_fails_because_it_was_moved_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("old")

    def read(stack: ExitStack) -> str:
        text = (tmp_path / "config.json").read_text()
        if text == "old":
            with staged(tmp_path, obsolete=lambda name: True) as folder:
                (folder / "config.json").write_text("new")
            raise FormatError("half of it")
        return text

    assert read_together(tmp_path, read) == "new"


def test_what_fails_by_itself_fails_at_once(tmp_path: Path) -> None:
    tries: list[None] = []

    def read(stack: ExitStack) -> None:
        tries.append(None)
        raise FormatError("damaged")

    with pytest.raises(FormatError, match="damaged"):
        read_together(tmp_path, read)
    assert len(tries) == 1


def test_half_of_a_save_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that stands still when some of its files are moved: it is completed, then read."""
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text("old")
    stalls = [True]

    def stalling(directory: Path) -> None:
        if stalls.pop():
            folder = tmp_path / COMPLETE
            folder.mkdir()
            (folder / "config.json").write_text("new")
            moves = {"files": ["config.json", "generation_config.json"], "remove": []}
            (folder / ".moves.json").write_text(json.dumps(moves))
            (tmp_path / "generation_config.json").write_text("new")  # moved already
            stalls.append(False)
        else:
            monkeypatch.undo()
            snapshot.complete(directory)

    monkeypatch.setattr(snapshot, "complete", stalling)
    names = ("config.json", "generation_config.json")
    found = read_together(tmp_path, lambda _: {(tmp_path / name).read_text() for name in names})
    assert found == {"new"}


def test_other_files_may_change(tmp_path: Path) -> None:
    """A log, an optimizer's state: no part of what is read."""

    def read(stack: ExitStack) -> int:
        with open(tmp_path / "log.txt", "a") as log:
            return log.write("step")

    assert read_together(tmp_path, read) == 4


# --- values ---------------------------------------------------------------------------------------


def rewritten(file: Path) -> None:
    """What cp, torch.save and save_file do: the same file, other values."""
    with open(file, "r+b") as opened_file:
        opened_file.seek(-4, os.SEEK_END)
        opened_file.write(b"\0\0\0\0")
    os.utime(file, ns=(1, 1))  # a clock of some file systems ticks every few milliseconds


def rewriting(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Has a file rewritten as soon as some of its values are read."""
    read, once = LazyTensor.read_stored, [file]

    def reading(tensor: LazyTensor) -> Any:
        found = read(tensor)
        if once:
            rewritten(once.pop())
        return found

    monkeypatch.setattr(LazyTensor, "read_stored", reading)


def test_a_file_that_is_rewritten_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(tmp_path / "model", "old")
    rewriting(monkeypatch, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*changed while it was read"):
        loaded(model)


def test_an_error_of_the_callers_own_comes_first(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "old")

    def read() -> None:
        with CheckpointReader.open(model):
            rewritten(model / "model.safetensors")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        read()


USES: dict[str, Callable[..., Any]] = {
    "conversion": lambda model, same, **how: convert(model, model.with_name("out"), **how),
    "comparison": compare,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_file_that_is_rewritten_while_it_is(use: Callable[..., Any], tmp_path: Path) -> None:
    """Nothing appears at the target of a conversion, and nothing is said to be equal."""
    model, same = make(tmp_path / "model", "old"), make(tmp_path / "same", "old")
    once = [model / "model.safetensors"]

    def progress(done: int, total: int) -> None:
        if done and once:
            rewritten(once.pop())

    with pytest.raises(CheckpointError, match="changed while it was read"):
        use(model, same, progress=progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "same"]


def test_texts_are_converted_with_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save after the source is opened: neither its tokenizer nor its settings come along."""
    model = make(tmp_path / "model", "old")
    once = [model]
    meanwhile(monkeypatch, "conversion.convert.make_plan", lambda: once and make(once.pop(), "new"))
    convert(model, tmp_path / "out")
    assert loaded(tmp_path / "out") == "old"
    assert (tmp_path / "out" / "vocab.json").read_text() == "old"
    assert plan(model).copied == ("generation_config.json", "vocab.json", "merges.txt")


def test_a_conversion_is_resumed_only_from_the_files_that_were_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer model of the same sizes takes its place at once; what is kept was of the older."""
    model = make(tmp_path / "model", "old")
    old = (model / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(old[:8], "little")
    new = old[:start] + np.full((len(old) - start) // 4, MODELS["new"], np.float32).tobytes()
    once = [new]
    options = {"max_shard_size": "2KB", "resume": True}

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyError("power")

    def newer() -> None:
        if once:
            atomic_write(model / "model.safetensors", once.pop())

    meanwhile(monkeypatch, "conversion.convert.make_plan", newer)
    with pytest.raises(KeyError, match="power"):
        convert(model, tmp_path / "out", progress=stop, **options)
    convert(model, tmp_path / "out", **options)
    with CheckpointReader.open(tmp_path / "out") as found:
        assert named_by_weights({name: tensor.read() for name, tensor in found.items()}) == "new"
