# SPDX-License-Identifier: Apache-2.0
"""`mmap`: which weights stay in their files, and what is noticed of those that are written to."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conversion import convert
from opt_core import CheckpointError, InputError
from opt_core.checkpoints import CheckpointIndex
from opt_core.checkpoints.sources import MappedFile
from opt_torch import (
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTModel,
)
from tests.cases import GOLDEN, case

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[5, 6, 7, 8]])
CHANGED = "expected it as it was when the model was loaded"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(case("pre_norm").folder, tmp_path / "model")


@pytest.fixture
def file(folder: Path) -> Path:
    return folder / "model.safetensors"


@pytest.fixture
def cached(folder: Path, tmp_path: Path) -> Path:
    """The same model as the hub's cache keeps it: each file is a link to a blob."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b/snapshots/1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def rewrite(file: Path) -> None:
    """As cp, torch.save and save_file do: zeros in the same file."""
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.seek(size // 4)
        opened.write(bytes(size - size // 4))
    os.utime(file, ns=(1, 1))  # clocks of file systems tick every few milliseconds


def replace(file: Path) -> None:
    """As save_pretrained does: another file takes the name."""
    shutil.copy(file, file.with_name("new"))
    rewrite(file.with_name("new"))
    file.with_name("new").replace(file)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def mapped(model: nn.Module) -> bool:
    """Whether the first weight lies in a file."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("the system does not tell what is mapped")
    address = next(model.parameters()).data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < end:
            return len(line.split()) > 5 and line.split()[5].startswith("/")
    return False


def descriptors(file: Path) -> int:
    """How often this process has a file open."""
    here = Path("/proc/self/fd")
    if not here.is_dir():
        pytest.skip("the system does not tell what is open")
    return sum(os.path.realpath(entry) == str(file.resolve()) for entry in here.iterdir())


# --- which are mapped -----------------------------------------------------------------------------


def test_only_what_nobody_rewrites_is_mapped_by_default(folder: Path, cached: Path) -> None:
    loaded = {
        (where, mmap): mapped(OPTForCausalLM.from_pretrained(place, mmap=mmap))
        for where, place in (("folder", folder), ("cache", cached))
        for mmap in (None, True, False)
    }
    assert loaded == {
        ("folder", None): False,
        ("folder", True): True,
        ("folder", False): False,
        ("cache", None): True,
        ("cache", True): True,
        ("cache", False): False,
    }


def test_other_formats_are_read_even_in_the_cache(folder: Path, cached: Path) -> None:
    blob = (cached / "model.safetensors").resolve()
    convert(folder, folder.with_name("bin"), to="bin")
    shutil.copy(folder.with_name("bin") / "pytorch_model.bin", blob)
    (cached / "model.safetensors").rename(cached / "pytorch_model.bin")
    expected = logits(OPTForCausalLM.from_pretrained(folder))
    for mmap in (None, True):
        model = OPTForCausalLM.from_pretrained(cached, mmap=mmap)
        assert mapped(model) == bool(mmap)
        assert torch.equal(logits(model), expected)


def test_shards(folder: Path) -> None:
    convert(folder, folder.with_name("shards"), max_shard_size="8KB")
    model = OPTForCausalLM.from_pretrained(folder.with_name("shards"), mmap=True)
    files = sorted(folder.with_name("shards").glob("*.safetensors"))
    assert len(files) > 3 and all(map(descriptors, files))
    rewrite(files[-1])
    with pytest.raises(CheckpointError, match=f"{files[-1].name}: {CHANGED}"):
        model(IDS)


NOT_AS_ASKED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another dtype": (
        "safetensors",
        {"dtype": "bfloat16"},
        r"\(bfloat16, .*embed_tokens.weight \(float32\).*dtype='auto'",
    ),
    "turned": ("flax_safetensors", {}, r"weight.*safetensors file .*convert the checkpoint"),
    "h5": ("h5", {}, "hdf5 file"),
    "msgpack": ("msgpack", {}, "msgpack file"),
    "no truth value": ("safetensors", {"mmap": "yes"}, "mmap: expected True, False or None"),
}


@pytest.mark.parametrize("kind", NOT_AS_ASKED)
def test_what_cannot_be_mapped_is_an_error(kind: str) -> None:
    format, options, message = NOT_AS_ASKED[kind]
    source = GOLDEN / "formats" / "pre_norm" / format
    assert source.is_dir()
    with pytest.raises(InputError, match=message):
        OPTForCausalLM.from_pretrained(source, **{"mmap": True, **options})


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["safetensors", "bin", "bin_legacy", "bin_sharded"])
def test_what_is_read_is_the_models_own(format: str, tmp_path: Path) -> None:
    source = shutil.copytree(GOLDEN / "formats" / "pre_norm" / format, tmp_path / "model")
    model = OPTForCausalLM.from_pretrained(source, dtype="auto")
    expected = logits(model)
    for path in source.iterdir():
        if path.suffix != ".json":
            rewrite(path)
            assert not descriptors(path)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    model.state_dict()


LIFE = """
import os, sys, torch
from opt_torch import OPTForCausalLM
folder, ids = sys.argv[1], torch.tensor([[5, 6, 7]])
file = folder + "/pytorch_model.bin"
model = OPTForCausalLM.from_pretrained(folder)
expected = OPTForCausalLM.from_pretrained(folder, dtype="float64").float()(ids).logits
for _ in range(2):
    torch.save(model.state_dict(), file)
    model = OPTForCausalLM.from_pretrained(folder)
    assert torch.equal(model(ids).logits, expected)
os.truncate(file, 100)
assert torch.equal(model(ids).logits, expected)
"""


def test_a_process_does_not_die(tmp_path: Path) -> None:
    """By SIGBUS, like one that saved a model over its own file, or whose file was cut short."""
    source = shutil.copytree(GOLDEN / "formats" / "pre_norm" / "bin", tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LIFE, str(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- what is noticed ----------------------------------------------------------------------------

CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "call": lambda model, folder: model(IDS),
    "forward": lambda model, folder: model.forward(IDS),
    "base model": lambda model, folder: model.model(IDS),
    "loss": lambda model, folder: model(IDS, labels=IDS),
    "generate": lambda model, folder: model.generate(IDS, max_new_tokens=2),
    "beams": lambda model, folder: model.generate(IDS, max_new_tokens=2, num_beams=2),
    "save": lambda model, folder: model.save_pretrained(folder / "saved"),
    "state": lambda model, folder: model.state_dict(),
    "state of the base model": lambda model, folder: model.model.state_dict(),
}


@pytest.mark.parametrize("kind", CALLS)
def test_each_call_notices_a_rewritten_file(kind: str, folder: Path, file: Path) -> None:
    model = OPTForCausalLM.from_pretrained(folder, mmap=True)
    CALLS[kind](model, folder.with_name("before"))
    rewrite(file)
    with pytest.raises(CheckpointError, match=rf"{file}: {CHANGED}.*mmap=False"):
        CALLS[kind](model, folder)
    assert not (folder / "saved").exists()


HEADS: dict[str, Callable[[Any], Any]] = {
    "call": lambda model: model(IDS),
    "forward": lambda model: model.forward(IDS),
    "generate": lambda model: model.generate(IDS, max_new_tokens=2),
}


@pytest.mark.parametrize("call", HEADS.values(), ids=HEADS)
def test_a_head_that_lies_in_a_file_of_its_own(call: Callable[[Any], Any], tmp_path: Path) -> None:
    convert(case("untied_gelu").folder, tmp_path / "shards", max_shard_size="1KB")
    index = CheckpointIndex.read(tmp_path / "shards" / "model.safetensors.index.json")
    model = OPTForCausalLM.from_pretrained(tmp_path / "shards", mmap=True)
    rewrite(tmp_path / "shards" / str(index.weight_map["lm_head.weight"]))
    with pytest.raises(CheckpointError, match=CHANGED):
        call(model)


@pytest.mark.parametrize(
    "model_class",
    [OPTModel, OPTForCausalLM, OPTForSequenceClassification, OPTForQuestionAnswering],
)
def test_each_class_notices_a_file_that_is_cut(model_class: Any, folder: Path, file: Path) -> None:
    """Before it touches what is no longer there."""
    model_class.from_pretrained(folder, output_loading_info=True)[0].save_pretrained(folder)
    model = model_class.from_pretrained(folder, mmap=True)
    model(IDS)
    os.truncate(file, 1000)
    with pytest.raises(CheckpointError, match=CHANGED):
        model(IDS)


def test_the_cache_is_watched_too(cached: Path) -> None:
    model = OPTForCausalLM.from_pretrained(cached)
    rewrite((cached / "model.safetensors").resolve())
    with pytest.raises(CheckpointError, match="the hub's cache"):
        model(IDS)


def test_a_file_that_is_replaced_is_none_that_changed(folder: Path, file: Path) -> None:
    model = OPTForCausalLM.from_pretrained(folder, mmap=True)
    expected = logits(model)
    replace(file)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(folder)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(OPTForCausalLM.from_pretrained(folder)), expected)
    file.unlink()
    assert torch.equal(logits(model), expected)


def test_generate_looks_once(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OPTForCausalLM.from_pretrained(folder, mmap=True)
    looks: list[MappedFile] = []
    monkeypatch.setattr(MappedFile, "check", lambda file: looks.append(file))
    model.generate(IDS, max_new_tokens=5)
    assert len(looks) == 1
    model(IDS)
    assert len(looks) == 2


def test_a_training_step_leaves_the_file_alone(folder: Path, file: Path) -> None:
    before = file.read_bytes()
    model = OPTForCausalLM.from_pretrained(folder, mmap=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    logits(model)
    assert file.read_bytes() == before and mapped(model)


# --- copies -------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "half": lambda model: model.half().float(),
    "double": lambda model: model.double().float(),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_have_no_file(kind: str, folder: Path, file: Path) -> None:
    model = OPTForCausalLM.from_pretrained(folder, mmap=True)
    assert descriptors(file)
    found = COPIES[kind](model)
    expected = logits(found)
    del model
    gc.collect()
    assert not descriptors(file)
    rewrite(file)
    assert torch.equal(logits(found), expected)


@pytest.mark.parametrize(
    "change",
    [
        *COPIES.values(),
        lambda model: model.to(torch.float64),
        lambda model: model.model.half(),
        lambda model: model.share_memory(),
        lambda model: model.resize_token_embeddings(80),
    ],
    ids=[*COPIES, "to", "base", "share_memory", "resize"],
)
def test_what_ends_the_watch_looks_once_more(
    change: Callable[[Any], Any], folder: Path, file: Path
) -> None:
    """The model had other weights afterwards, and no call could notice any more."""
    model = OPTForCausalLM.from_pretrained(folder, mmap=True)
    rewrite(file)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        change(model)


def test_what_others_keep_of_a_file_is_no_concern_of_the_model(folder: Path, file: Path) -> None:
    model = OPTForCausalLM.from_pretrained(folder, mmap=True)
    state = model.state_dict()
    model.double()
    rewrite(file)
    assert descriptors(file)
    model(IDS)
    del state
    gc.collect()
    assert not descriptors(file)


def test_no_descriptor_is_left_behind(folder: Path, file: Path) -> None:
    for mmap in (True, False):
        for _ in range(3):
            logits(OPTForCausalLM.from_pretrained(folder, mmap=mmap))
    gc.collect()
    assert not descriptors(file)


# --- programs -----------------------------------------------------------------------------------


@pytest.fixture
def programs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_programs_do_not_look(folder: Path, programs: None) -> None:
    """They are made of a mapped model as of any other, in one piece."""
    options = {"attn_implementation": "eager", "mmap": True}
    model = OPTForCausalLM.from_pretrained(folder, **options)
    expected = logits(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(IDS).logits, expected)
        for strict in (True, False):
            exported = torch.export.export(model, (IDS,), strict=strict)
            torch.testing.assert_close(exported.module()(IDS).logits, expected)
        parameters = dict(model.named_parameters())

        def call(ids: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, parameters, (ids[None],)).logits

        torch.testing.assert_close(torch.vmap(call)(IDS)[0], expected)


# --- weights on disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("change", [rewrite, replace, Path.unlink])
def test_weights_on_disk_are_read_by_name(
    change: Callable[[Path], Any], folder: Path, file: Path
) -> None:
    """accelerate opens the file whenever a module runs: any other there is an error."""
    model = OPTForCausalLM.from_pretrained(folder, device_map="disk")
    expected = logits(model)
    assert torch.equal(logits(model), expected)
    change(file)
    for call in (logits, lambda model: model.generate(IDS, max_new_tokens=2)):
        with pytest.raises(CheckpointError, match=rf"{file}: {CHANGED}.*device_map='cpu'"):
            call(model)


def test_what_is_written_for_later_is_not_the_checkpoints(folder: Path, file: Path) -> None:
    options = {"dtype": "bfloat16", "offload_folder": folder / "offload"}
    model = OPTForCausalLM.from_pretrained(folder, device_map="disk", **options)
    expected = logits(model)
    rewrite(file)
    assert torch.equal(logits(model), expected)


def test_mapped_beside_a_device_map(folder: Path, file: Path) -> None:
    model = OPTForCausalLM.from_pretrained(folder, device_map="cpu", mmap=True)
    assert mapped(model)
    assert not mapped(OPTForCausalLM.from_pretrained(folder, device_map="cpu"))
    rewrite(file)
    with pytest.raises(CheckpointError, match=CHANGED):
        model(IDS)
