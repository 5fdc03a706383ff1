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

import pytest
from fake_hub import FakeHub, FakeRepo

from opt_core.errors import HubError
from opt_core.hub import resolve

ROOT = Path(__file__).parents[2]

# HF_ENDPOINT and HF_HOME are read when huggingface_hub is imported: each caller is a new process.
ASK = """
import json, sys
from opt_core.errors import HubError
from opt_core.hub import resolve
answers = []
for arguments in json.loads(sys.argv[1]):
    try:
        folder = resolve(**arguments)
        answers.append(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
    except HubError as error:
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
    "org/flax": FakeRepo(CONFIG | {"flax_model.msgpack": b"f"}),
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
    unknown, gated, revision, flax, folder, malformed = ask(
        hub.url,
        tmp_path,
        {"name_or_path": "org/unknown"},
        {"name_or_path": "org/gated"},
        {"name_or_path": "org/both", "revision": "v9"},
        {"name_or_path": "org/flax"},
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
    assert "found neither" in flax
    assert "model.safetensors" in flax
    assert "subfolder nowhere" in folder
    assert "found neither" in folder
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
