# SPDX-License-Identifier: Apache-2.0
"""Our backends against transformers 4.37.2, live: random configurations, and real sizes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.random_checkpoint import write_random_checkpoint
from opt_core import OPTConfig
from opt_core.checkpoints import CheckpointReader
from opt_core.config import ACTIVATIONS
from opt_core.dtypes import MODEL_DTYPES
from tests.oracle.jobs import Job, relative_error, run_ours, run_peer
from tests.oracle.record import record
from tests.reference.model import forward

pytestmark = pytest.mark.oracle
FRAMEWORKS = ("torch", "tf", "flax")
DTYPES = ("float32", "bfloat16", "float16")
LIMIT = 5e-5  # of the logits, relative to the largest
NUM_RANDOM = 16


def random_config(rng: np.random.Generator) -> OPTConfig:
    """A small configuration with every option drawn."""
    heads = int(rng.integers(1, 5))
    hidden = heads * int(rng.choice([4, 8, 10]))
    return OPTConfig(
        vocab_size=int(rng.integers(60, 200)),
        hidden_size=hidden,
        num_hidden_layers=int(rng.integers(1, 5)),
        ffn_dim=int(rng.integers(5, 80)),
        max_position_embeddings=128,
        do_layer_norm_before=bool(rng.integers(2)),
        _remove_final_layer_norm=bool(rng.integers(2)),
        word_embed_proj_dim=int(rng.choice([hidden, hidden // 2 + 1, hidden + 3])),
        num_attention_heads=heads,
        activation_function=str(rng.choice([a for a in ACTIVATIONS if a != "gelu_python"])),
        enable_bias=bool(rng.integers(2)),
        layer_norm_elementwise_affine=bool(rng.integers(2)),
        tie_word_embeddings=bool(rng.integers(2)),
    )


def write_inputs(path: Path, rng: np.random.Generator, vocab: int, rows: int, length: int) -> None:
    """A batch whose rows are padded on the left by different lengths."""
    ids = rng.integers(3, vocab, (rows, length))
    mask = (np.arange(length) >= rng.integers(0, length - 2, (rows, 1))).astype(np.int64)
    mask[0] = 1
    np.savez(path, input_ids=np.where(mask == 1, ids, 1), attention_mask=mask)


@pytest.fixture(scope="module")
def random_jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    folder = tmp_path_factory.mktemp("random")
    jobs = []
    for index in range(NUM_RANDOM):
        rng = np.random.default_rng(index)
        config = random_config(rng)
        write_random_checkpoint(folder / str(index), config, seed=index, scale=5.0)
        inputs = folder / f"{index}.npz"
        write_inputs(inputs, rng, config.vocab_size, rows=4, length=int(rng.integers(5, 20)))
        jobs.append(Job(str(folder / str(index)), str(inputs), new_tokens=64))
    return jobs


@pytest.fixture(scope="module")
def random_expected(random_jobs, tmp_path_factory):
    return run_peer("hf437", "pt", random_jobs, tmp_path_factory.mktemp("expected"))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_random_configurations(framework, random_jobs, random_expected, tmp_path):
    worst = 0.0
    for job, found, expected in zip(
        random_jobs, run_ours(framework, random_jobs, tmp_path), random_expected, strict=True
    ):
        mask = np.load(job.inputs)["attention_mask"]
        worst = max(worst, relative_error(found["logits"], expected["logits"], mask))
        config = Path(job.checkpoint, "config.json").read_text()
        assert worst <= LIMIT, config
        np.testing.assert_array_equal(found["sequences"], expected["sequences"], config)
    record("random configurations", framework, NUM_RANDOM, worst)


@pytest.mark.parametrize("dtype", DTYPES)
def test_precision(dtype, random_jobs, tmp_path):
    """No backend is further from the float64 specification than the reference in the same dtype.

    As the root mean square over all real tokens of all models, which rounding luck moves by one or
    two per cent; the specification runs on the weights as the dtype holds them.
    """
    jobs = [replace(job, dtype=dtype, new_tokens=0) for job in random_jobs]
    truth = [exact_logits(job) for job in jobs]
    results = {"reference": run_peer("hf437", "pt", jobs, tmp_path / "reference")}
    for framework in FRAMEWORKS:
        results[framework] = run_ours(framework, jobs, tmp_path / framework)
    errors = {}
    for who, found in results.items():
        every = [
            ((f["logits"] - exact) / np.abs(exact[real]).max())[real].ravel()
            for f, (exact, real) in zip(found, truth, strict=True)
        ]
        errors[who] = float(np.sqrt(np.mean(np.concatenate(every) ** 2)))
        record(f"precision {dtype}", who, NUM_RANDOM, errors[who])
    for framework in FRAMEWORKS:
        assert errors[framework] <= 1.02 * errors["reference"], errors


def exact_logits(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """The specification's logits [B, T, V] and where the tokens are real [B, T]."""
    config = OPTConfig.from_json_file(Path(job.checkpoint, "config.json"))
    with CheckpointReader.open(job.checkpoint) as reader:
        weights = {n: t.read().astype(MODEL_DTYPES[job.dtype]) for n, t in reader.items()}
    inputs = dict(np.load(job.inputs))
    return forward(config, weights, **inputs)["logits"], inputs["attention_mask"] == 1


@pytest.mark.parametrize("size", ["opt-125m", "opt-350m", "opt-1.3b"])
def test_real_sizes(size, tmp_path):
    """Random weights at the published sizes: logits, and 64 greedy tokens of a left-padded batch."""
    write_random_checkpoint(tmp_path / size, OPTConfig.preset(size))
    write_inputs(tmp_path / "in.npz", np.random.default_rng(0), 50265, rows=2, length=12)
    jobs = [Job(str(tmp_path / size), str(tmp_path / "in.npz"), new_tokens=64)]
    (expected,) = run_peer("hf437", "pt", jobs, tmp_path / "expected")
    mask = np.load(tmp_path / "in.npz")["attention_mask"]
    for framework in FRAMEWORKS:
        (found,) = run_ours(framework, jobs, tmp_path / framework)
        error = relative_error(found["logits"], expected["logits"], mask)
        assert error <= LIMIT, (framework, error)
        np.testing.assert_array_equal(found["sequences"], expected["sequences"], framework)
        record(size, framework, 1, error)
    shutil.rmtree(tmp_path / size)
