# SPDX-License-Identifier: Apache-2.0
"""What is disturbed in the tests of faults: a save, a conversion, the command; and what is left."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from conversion import convert
from opt_core import GenerationConfig, OPTConfig
from opt_core.params import Param, param_table
from opt_core.pretrained import open_pretrained, save_pretrained
from opt_core.staging import staged
from opt_zoo import cli, terminal

ARCHITECTURE = "OPTForCausalLM"
#: Two models that differ in weights, configuration, generation configuration and tokenizer.
MODELS = {"old": 1, "new": 2}
TEXTS = ("generation_config.json", "vocab.json", "merges.txt")

Content = tuple[dict[str, Any], dict[str, Any], dict[str, bytes], dict[str, bytes]]


def config(model: str) -> OPTConfig:
    return OPTConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=MODELS[model],
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=8,
    )


def values(model: str, param: Param) -> np.ndarray:
    return np.full(param.shape, MODELS[model], np.float32)


def save(directory: str, model: str, size: int | str = "5GB") -> None:
    """Saves one of the models as a framework does."""
    settings = GenerationConfig.from_dict({"max_length": 10 + MODELS[model]})
    tensors = [
        (param, np.dtype(np.float32), partial(values, model, param))
        for param in param_table(config(model), ARCHITECTURE)
    ]
    save_pretrained(
        directory,
        config(model),
        settings,
        ARCHITECTURE,
        tensors,
        own_format="safetensors",
        max_shard_size=size,
    )


def make(directory: Path, model: str, size: int | str = "5GB") -> Path:
    """A checkpoint with a tokenizer, to be converted or overwritten."""
    save(str(directory), model, size)
    (directory / "vocab.json").write_text(model)
    if model == "old":
        (directory / "merges.txt").write_text("belongs to the old tokenizer")
    return directory


def convert_until(source: str, target: str, shards: int, **options: Any) -> None:
    """Converts, and dies when so many shards are complete and the next is begun."""

    def progress(done: int, total: int) -> None:
        if len(list(Path(target).parent.rglob(f".*/{SHARD}"))) == shards and done < total:
            os.kill(os.getpid(), signal.SIGKILL)

    convert(source, target, progress=progress, **options)


SHARD = "model-*-of-*.safetensors"


def folders(directory: str, model: str) -> None:
    """Saves files and a folder of files that belong together, like those of orbax."""
    with staged(Path(directory), obsolete=lambda name: name == "orbax") as folder:
        (folder / "orbax").mkdir()
        for name in (f"{model}-0", "_METADATA", f"{model}-1"):  # removed in whatever order
            (folder / "orbax" / name).write_text(model)
        (folder / "config.json").write_text(model)


def command(*arguments: str) -> dict[str, Any]:
    """Runs `opt-zoo` in this process."""
    sys.argv = ["opt-zoo", *arguments]
    sys.stdin = io.StringIO()
    printed, said = io.StringIO(), io.StringIO()
    terminal.err.file, terminal.out.file = said, printed
    code: Any = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
    return {"code": code, "stdout": printed.getvalue(), "stderr": said.getvalue()}


def execute(*words: str) -> int:
    """Runs another program; returns its exit code."""
    return subprocess.run(words, check=False).returncode


def content(directory: Path) -> Content | None:
    """What loading a model sees: configurations, weights, texts; None where there is nothing."""
    if not directory.exists():
        return None
    with open_pretrained(directory, ARCHITECTURE) as found:
        found.check()
        weights = {name: source.tensor.read().tobytes() for name, source in found.sources.items()}
        texts = {name: directory / name for name in TEXTS}
        return (
            {**found.config.to_dict(), "_name_or_path": ""},
            found.generation_config.to_dict(),
            weights,
            {name: path.read_bytes() for name, path in texts.items() if path.exists()},
        )


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too, with what it holds."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def hidden(directory: Path) -> list[str]:
    """Hidden files and folders in a directory and in those that stand in it."""
    return sorted(str(path) for depth in (".*", "*/.*") for path in directory.glob(depth))


JOBS = {
    "save": save,
    "convert": lambda source, target, **options: convert(source, target, **options) and None,
    "convert_until": convert_until,
    "folders": folders,
    "command": command,
    "execute": execute,
}
