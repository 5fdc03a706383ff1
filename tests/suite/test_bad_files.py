# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained` on files that lie, and on places without a model."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from opt_core import CheckpointError, ConfigError, FormatError, HubError
from tests.backends.base import Backend
from tests.cases import GOLDEN

EMBEDDING = "model.decoder.embed_tokens.weight"
FC1 = "model.decoder.layers.1.fc1.weight"


def test_a_truncated_file(backend: Backend, folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for length in (0, 4, 100, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            backend.load(folder)


def test_a_header_that_lies(backend: Backend, folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[FC1]["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(FormatError, match=FC1):
        backend.load(folder)
    file.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        backend.load(folder)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_bin_that_asks_for_a_command(backend: Backend, folder: Path, kind: str) -> None:
    """Unpickling it as PyTorch once did would run the command."""
    (folder / "model.safetensors").unlink()
    ran, file = folder / "ran", folder / "pytorch_model.bin"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {ran}",)

    state = pickle.dumps({"x": Evil()}, 2)
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", state)
            archive.writestr("archive/version", "3\n")
    else:
        start = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
        parts = [pickle.dumps(value, 2) for value in start]
        file.write_bytes(b"".join([*parts, state, pickle.dumps([], 2)]))
    with pytest.raises(FormatError, match=rf"{os.name}\W+system"):
        backend.load(folder)
    assert not ran.exists()


def test_an_index_that_points_outside(backend: Backend, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {EMBEDDING: "../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"plain name of a file .*\.\./\.\./etc/passwd"):
        backend.load(folder)


def test_an_index_whose_shard_is_missing(backend: Backend, folder: Path) -> None:
    shutil.copytree(
        GOLDEN / "formats" / "pre_norm" / "safetensors_sharded", folder, dirs_exist_ok=True
    )
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-00003\.safetensors beside the index"):
        backend.load(folder)


def test_a_directory_without_weights_or_config(backend: Backend, folder: Path) -> None:
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        backend.load(folder)
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        backend.load(folder)


def test_no_such_directory(backend: Backend, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="nowhere"):
        backend.load(tmp_path / "nowhere")


@pytest.mark.parametrize("how", ["unreachable", pytest.param("offline", marks=pytest.mark.slow)])
def test_no_network(backend: Backend, tmp_path: Path, how: str) -> None:
    """A name that is neither cached nor reachable: an error that says so, soon."""
    environment = {
        "offline": {"HF_HUB_OFFLINE": "1"},
        "unreachable": {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
    }[how]
    code = (
        f"from tests.backends.{backend.name} import BACKEND\n"
        "from opt_core import HubError\n"
        "try:\n"
        "    BACKEND.load('facebook/opt-125m')\n"
        "except HubError as error:\n"
        "    print('HubError:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=GOLDEN.parents[1],
        env={**os.environ, **environment, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith("HubError: "), done.stderr
    assert "facebook/opt-125m" in done.stdout
