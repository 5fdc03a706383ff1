# SPDX-License-Identifier: Apache-2.0
"""Directories and hub names become directories with files; what cannot be had says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import FakeHub, FakeRepo, Fault
from safetensors.numpy import save

from opt_core.errors import HubError
from opt_core.hub import resolve

ROOT = Path(__file__).parents[2]

# HF_ENDPOINT and HF_HOME are read when huggingface_hub is imported: each caller is a new process.
ASK = """
import json, sys, time
from opt_core.checkpoints import CheckpointReader
from opt_core.errors import FormatError, HubError
from opt_core.hub import resolve
time.sleep = lambda seconds: None  # between attempts
answers = []
for arguments in json.loads(sys.argv[1]):
    read = arguments.pop("read", False)
    try:
        folder = resolve(**arguments)
        if read:
            with CheckpointReader.open(folder) as reader:
                answers.append({name: tensor.read().tolist() for name, tensor in reader.items()})
        else:
            paths = (path for path in folder.rglob("*") if path.is_file())
            answers.append(sorted(path.relative_to(folder).as_posix() for path in paths))
    except (HubError, FormatError) as error:
        answers.append(str(error))
print(json.dumps(answers))
"""

CONFIG = {"config.json": b"{}", "vocab.json": b"{}", "README.md": b"no"}
REPOS = {
    "org/both": FakeRepo(
        CONFIG
        | {
            "model.safetensors": b"s",
            "pytorch_model.bin": b"t",
            "flax_model.msgpack": b"f",
            "tf_model.h5": b"h",
            "onnx/model.onnx": b"o",
            "sub/config.json": b"{}",
            "sub/pytorch_model-00001-of-00002.bin": b"1",
            "sub/pytorch_model-00002-of-00002.bin": b"2",
            "sub/pytorch_model.bin.index.json": b"{}",
            "sub/tf_model.h5": b"h",
        },
        branches=("main", "v2"),
    ),
    "org/torch": FakeRepo(CONFIG | {"pytorch_model.bin": b"t", "flax_model.msgpack": b"f"}),
    "org/none": FakeRepo(CONFIG | {"model.onnx": b"o", "training_args.bin": b"t"}),
    "org/gated": FakeRepo(CONFIG | {"model.safetensors": b"s"}, gated=True),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub(REPOS) as hub:
        yield hub


def ask(endpoint: str, home: Path, *calls: dict[str, Any], **environment: str) -> list[Any]:
    """Resolve in a process of its own; return a list of file names or a message for each call."""
    clean = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(calls)],
        env={
            **clean,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout)
    return answers


def test_fetches_what_is_needed_and_no_more(hub: FakeHub, tmp_path: Path) -> None:
    text, both, sub, torch, branch = ask(
        hub.url,
        tmp_path,
        {"name_or_path": "org/torch", "weights": False},
        {"name_or_path": "org/both"},
        {"name_or_path": "org/both", "subfolder": "sub"},
        {"name_or_path": "org/torch"},
        {"name_or_path": "org/both", "revision": "v2"},
    )
    assert text == ["config.json", "vocab.json"]
    assert both == ["config.json", "model.safetensors", "vocab.json"]
    assert sub == [
        "config.json",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
    ]
    assert torch == ["config.json", "pytorch_model.bin", "vocab.json"]
    assert branch[:2] == ["config.json", "model.safetensors"]
    assert not [request for request in hub.requests if request.endswith((".msgpack", ".h5", ".md"))]


# Each kind of weights, whole and in shards, in the order in which they are looked for.
KINDS = {
    "safetensors": ["model.safetensors"],
    "safetensors in shards": ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
    "bin": ["pytorch_model.bin"],
    "bin in shards": ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
    "h5": ["tf_model.h5"],
    "h5 in shards": ["tf_model-00001-of-00002.h5", "tf_model.h5.index.json"],
    "msgpack": ["flax_model.msgpack"],
    "msgpack in shards": ["flax_model-00001-of-00002.msgpack", "flax_model.msgpack.index.json"],
    "keras": ["model.weights.h5"],
    "keras in shards": ["model.weights.json", "model_00000.weights.h5", "model_00001.weights.h5"],
    "orbax": ["orbax/_METADATA", "orbax/d/1", "orbax/model.fc1.kernel/0.0"],
}
OTHERS = ("model.onnx", "optimizer.bin", "more/model.safetensors", "orbax.txt")


def test_one_kind_of_weights_is_fetched(tmp_path: Path) -> None:
    """The first that there is: each model here has a kind and all that come later."""
    kinds = list(KINDS)
    repos = {}
    for number, kind in enumerate(kinds):
        later = kinds[number + 1 + (kind + " in shards" in kinds) :]
        files = [file for other in (kind, *later) for file in KINDS[other]]
        contents = {file: file.encode() for file in ("config.json", *OTHERS, *files)}
        repos[f"org/{number}"] = FakeRepo(contents)
    with FakeHub(repos) as hub:
        answers = ask(hub.url, tmp_path, *({"name_or_path": name} for name in repos))
        for name, kind, answer in zip(repos, kinds, answers, strict=True):
            assert answer == hub.fetched(name) == sorted(["config.json", *KINDS[kind]])


def test_a_preferred_frameworks_kinds_come_first(tmp_path: Path) -> None:
    """Each model lacks what was fetched for the one before it."""
    whole = {kind: KINDS[kind] for kind in ("safetensors", "bin", "h5", "msgpack", "keras")}
    orders = {
        None: ["safetensors", "bin", "h5", "msgpack"],
        "pt": ["bin", "safetensors", "h5", "msgpack"],
        "tf": ["h5", "keras", "safetensors", "bin"],
        "flax": ["msgpack", "safetensors", "bin", "h5"],
    }
    repos, calls, expected = {}, [], []
    for prefer, order in orders.items():
        for number, first in enumerate(order):
            left = [kind for kind in whole if kind not in order[:number]]
            files = [file for kind in left for file in whole[kind]]
            name = f"org/{prefer}-{number}"
            repos[name] = FakeRepo({"config.json": b"{}"} | dict.fromkeys(files, b"x"))
            calls.append({"name_or_path": name, "prefer": prefer})
            expected.append(sorted(["config.json", *whole[first]]))
    with FakeHub(repos) as hub:
        assert ask(hub.url, tmp_path, *calls) == expected


def test_offline_the_kind_that_is_whole_in_the_cache(tmp_path: Path) -> None:
    """Fetched for TensorFlow once, the model is found again without saying so."""
    files = CONFIG | {"model.safetensors": b"s", "tf_model.h5": b"h"}
    call = {"name_or_path": "org/both"}
    with FakeHub({"org/both": FakeRepo(files)}) as hub:
        (online,) = ask(hub.url, tmp_path, {**call, "prefer": "tf"})
        asked = len(hub.requests)
        (local,) = ask(hub.url, tmp_path, {**call, "local_files_only": True})
        (offline,) = ask(hub.url, tmp_path, call, HF_HUB_OFFLINE="1")
        assert len(hub.requests) == asked
    assert online == local == offline == ["config.json", "tf_model.h5", "vocab.json"]


def test_the_cache_needs_no_network(hub: FakeHub, tmp_path: Path) -> None:
    call = {"name_or_path": "org/torch", "cache_dir": str(tmp_path / "elsewhere")}
    online = ask(hub.url, tmp_path, call)
    asked = len(hub.requests)
    offline = ask(
        hub.url,
        tmp_path,
        {**call, "local_files_only": True},
        {"name_or_path": "org/torch", "local_files_only": True},
    )
    assert offline[0] == online[0]
    assert "cache" in offline[1]
    assert "local_files_only" in offline[1]
    assert len(hub.requests) == asked


def test_says_what_was_tried_and_what_to_do(hub: FakeHub, tmp_path: Path) -> None:
    unknown, gated, revision, none, folder, malformed = ask(
        hub.url,
        tmp_path,
        {"name_or_path": "org/unknown"},
        {"name_or_path": "org/gated"},
        {"name_or_path": "org/both", "revision": "v9"},
        {"name_or_path": "org/none"},
        {"name_or_path": "org/both", "subfolder": "nowhere"},
        {"name_or_path": "org/a--b"},
    )
    assert "org/unknown" in unknown
    assert hub.url in unknown
    assert "HF_TOKEN" in unknown
    assert "org/gated" in gated
    assert "HF_TOKEN" in gated
    assert "terms" in gated
    assert "revision v9" in revision
    assert "branch" in revision
    assert "found none of them" in none
    assert "model.safetensors, pytorch_model.bin, tf_model.h5" in none
    assert "subfolder nowhere" in folder
    assert "found none of them" in folder
    assert "no hub name" in malformed


def test_without_a_network_the_answer_comes_at_once(tmp_path: Path) -> None:
    begin = time.monotonic()
    (closed,) = ask("http://127.0.0.1:9", tmp_path, {"name_or_path": "org/a"})
    assert time.monotonic() - begin < 15
    assert "cannot be reached" in closed
    assert "HF_ENDPOINT" in closed
    assert "http://127.0.0.1:9" in closed
    (offline,) = ask("http://127.0.0.1:9", tmp_path, {"name_or_path": "org/a"}, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in offline


def test_a_directory_is_returned_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path), subfolder="inner", weights=False) == tmp_path / "inner"
    with pytest.raises(HubError, match="expected a subfolder 'other'"):
        resolve(tmp_path, subfolder="other")


@pytest.mark.parametrize(
    "name", ["../x", "./x", "/no/such/place", "~/no-such-place", "a/b/c", "a b", ""]
)
def test_a_path_that_does_not_exist_is_not_sought_on_the_hub(name: str) -> None:
    with pytest.raises(HubError, match="expected an existing directory or a hub name"):
        resolve(name)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(HubError, match="found a file"):
        resolve(file)


@pytest.mark.parametrize("subfolder", ["..", "../x", "/etc", "a/../b", "*", "a\\b"])
def test_a_subfolder_stays_inside(tmp_path: Path, subfolder: str) -> None:
    with pytest.raises(HubError, match="inside the model"):
        resolve(tmp_path, subfolder=subfolder)


# ---- a hub that fails or lies -------------------------------------------------------------------

WEIGHTS = np.arange(64, dtype=np.float32)
WHOLE = {"config.json": b"{}", "model.safetensors": save({"weight": WEIGHTS})}
SIZE = len(WHOLE["model.safetensors"])
READ = {"name_or_path": "org/m", "read": True}


def test_an_interrupted_download_is_completed_by_the_next(tmp_path: Path) -> None:
    """Whether the connection breaks or nothing more comes."""
    stops = {"org/breaks": Fault(stop=SIZE // 2), "org/silent": Fault(stop=SIZE // 2, silent=True)}
    repos = {
        name: FakeRepo(dict(WHOLE), faults={"model.safetensors": fault})
        for name, fault in stops.items()
    }
    calls = [{"name_or_path": name, "read": True} for name in repos]
    local = [{**call, "local_files_only": True} for call in calls]
    begin = time.monotonic()
    with FakeHub(repos) as hub:
        answers = ask(hub.url, tmp_path, *calls, *local, HF_HUB_DOWNLOAD_TIMEOUT="1")
        assert time.monotonic() - begin < 30
        for name, broken, again in zip(repos, answers[:2], answers[2:], strict=True):
            assert f"{name}: fetching it from" in broken
            assert "Try again" in broken
            assert "in the cache" in again  # half a file is not taken for a whole one
        assert not list(tmp_path.rglob("model.safetensors"))
        for repo in repos.values():
            repo.faults.clear()
        answers = ask(hub.url, tmp_path, *calls, *local)
    assert answers == [{"weight": WEIGHTS.tolist()}] * 4


def test_an_interrupted_shard_is_not_passed_over(tmp_path: Path) -> None:
    """Some shards arrived and others did not: that is no model."""
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = {"weight_map": {"a": first, "b": second}}
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        first: save({"a": WEIGHTS}),
        second: save({"b": WEIGHTS}),
    }
    repo = FakeRepo(files, faults={second: Fault(stop=100)})
    with FakeHub({"org/m": repo}) as hub:
        broken, local = ask(hub.url, tmp_path, READ, {**READ, "local_files_only": True})
        assert "Try again" in broken
        assert "missing or incomplete" in local
        repo.faults.clear()
        (whole,) = ask(hub.url, tmp_path, READ)
    assert whole == {"a": WEIGHTS.tolist(), "b": WEIGHTS.tolist()}


LIES = {
    Fault(head=10): "should be of size",
    Fault(head=-10): "should be of size",
    Fault(get=10): "Try again",
    Fault(get=-10): "should be of size",
    Fault(head=10, get=10): "Try again",
    Fault(head=-10, get=-10): "its download incomplete: fetch it again",
    Fault(head=-10, get=-10, tree=-10): "its download incomplete: fetch it again",
    Fault(tree=10): None,
    Fault(tree=-10): None,
    Fault(tree=-(10**6)): None,
    Fault(tree=10**15): None,
}


def test_a_hub_that_lies_about_sizes(tmp_path: Path) -> None:
    """Nobody gets a wrong model; the size in the list of files is not needed to get the right one."""
    repos = {
        f"org/{number}": FakeRepo(dict(WHOLE), faults={"model.safetensors": fault})
        for number, fault in enumerate(LIES)
    }
    calls = [{"name_or_path": name, "read": True} for name in repos]
    begin = time.monotonic()
    with FakeHub(repos) as hub:
        answers = ask(hub.url, tmp_path, *calls, HF_HUB_DOWNLOAD_TIMEOUT="1")
        assert time.monotonic() - begin < 30
        for (fault, message), answer in zip(LIES.items(), answers, strict=True):
            if message is None:
                assert answer == {"weight": WEIGHTS.tolist()}, fault
            else:
                assert message in answer, fault
        for repo in repos.values():
            repo.faults.clear()
        answers = ask(hub.url, tmp_path, *({**call, "force_download": True} for call in calls))
    assert answers == [{"weight": WEIGHTS.tolist()}] * len(LIES)


def test_names_that_lead_out_of_the_cache(tmp_path: Path) -> None:
    path = "model-/../../../../../../outside-of-.safetensors"
    with FakeHub({"org/m": FakeRepo({"config.json": b"{}", path: b"x"})}) as hub:
        (answer,) = ask(hub.url, tmp_path / "a" / "b", {"name_or_path": "org/m"})
    assert isinstance(answer, str)
    assert not [file for file in tmp_path.rglob("*") if file.name.startswith("outside")]
