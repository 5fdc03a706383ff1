# SPDX-License-Identifier: Apache-2.0
"""The files that we save, read by others: transformers 4.37.2, 4.57.1 and 5, and CTranslate2."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.random_checkpoint import write_random_checkpoint
from tests.oracle.jobs import CONFIGS, Job, peer_python, relative_error, run_ours, run_peer

pytestmark = pytest.mark.oracle
FRAMEWORKS = ("torch", "tf", "flax")
#: Which of the peers' classes read which of our files; TF has no untied head.
READERS = [("hf437", "pt"), ("hf437", "tf"), ("hf437", "flax"), ("hf457", "pt"), ("hf5", "pt")]

SAVE = """
import importlib, sys
backend = importlib.import_module(f"tests.backends.{sys.argv[1]}").BACKEND
backend.load(sys.argv[2]).save_pretrained(sys.argv[3], max_shard_size=sys.argv[4])
"""


def save(framework: str, source: Path, target: Path, max_shard_size: str = "5GB") -> None:
    """Loads and saves with one of our backends, in a process of its own."""
    import sys

    from tests.oracle.jobs import ROOT

    command = [sys.executable, "-c", SAVE, framework, str(source), str(target), max_shard_size]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Each configuration saved by each of our backends, and once as shards."""
    folder = tmp_path_factory.mktemp("saved")
    rng = np.random.default_rng(0)
    inputs = folder / "in.npz"
    ids = rng.integers(3, 96, (3, 7))
    mask = np.ones_like(ids)
    np.savez(inputs, input_ids=ids, attention_mask=mask)
    jobs = {}
    for name, config in CONFIGS.items():
        write_random_checkpoint(folder / name, config, scale=5.0)
        jobs[f"{name}/source"] = Job(str(folder / name), str(inputs))
        for framework in FRAMEWORKS:
            target = folder / f"{name}-{framework}"
            save(framework, folder / name, target)
            jobs[f"{name}/{framework}"] = Job(str(target), str(inputs))
        save("torch", folder / name, folder / f"{name}-shards", "20KB")
        jobs[f"{name}/shards"] = Job(str(folder / f"{name}-shards"), str(inputs))
    return jobs


@pytest.mark.parametrize(("peer", "framework"), READERS)
def test_transformers_reads_them(peer, framework, saved, tmp_path):
    if (peer, framework) == ("hf437", "pt"):
        readable = dict(saved)
    else:  # 4.37.2 in TF and Flax reads no sharded safetensors, in TF no head of its own
        sharded = framework != "pt"
        readable = {
            name: job
            for name, job in saved.items()
            if not (sharded and name.endswith("shards"))
            and not (framework == "tf" and name.startswith("untied"))
        }
    expected = run_ours("torch", list(readable.values()), tmp_path / "ours")
    found = run_peer(peer, framework, list(readable.values()), tmp_path / "peer")
    for name, ours, theirs in zip(readable, expected, found, strict=True):
        error = relative_error(theirs["logits"], ours["logits"], np.ones((3, 7)))
        assert error <= 1e-5, (name, error)


CONVERT = """
import json, sys, ctranslate2
source, target, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ctranslate2.converters.TransformersConverter(source).convert(target)
generator = ctranslate2.Generator(target, device="cpu")
[result] = generator.generate_batch([prompt], max_length=8, include_prompt_in_result=False)
print(json.dumps(result.sequences[0]))
"""


def test_ctranslate2_converts_and_decodes_the_same(tmp_path):
    """The embedded model with its tokenizer: CTranslate2 writes the same greedy tokens."""
    from opt_core.assets import TINY_SUMS
    from opt_core.tokenizer import OPTTokenizer

    tokenizer = OPTTokenizer.from_pretrained(TINY_SUMS)
    save("torch", TINY_SUMS, tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    prompt = tokenizer("forty-two plus seventeen is")["input_ids"]
    np.savez(tmp_path / "in.npz", input_ids=[prompt], attention_mask=np.ones((1, len(prompt)), int))
    jobs = [Job(str(tmp_path / "saved"), str(tmp_path / "in.npz"), new_tokens=8)]
    (ours,) = run_ours("torch", jobs, tmp_path / "ours")
    tokens = json.dumps(tokenizer.convert_ids_to_tokens(prompt))
    command = [str(peer_python("ct2")), "-c", CONVERT, tmp_path / "saved", tmp_path / "ct2", tokens]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    expected = tokenizer.convert_ids_to_tokens(ours["sequences"][0, len(prompt) :].tolist())
    assert theirs == expected[: len(theirs)] and theirs
