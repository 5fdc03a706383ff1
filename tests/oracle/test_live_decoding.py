# SPDX-License-Identifier: Apache-2.0
"""Random strategies and options of `generate` against transformers 4.37.2, live."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.random_checkpoint import write_random_checkpoint
from tests.oracle.jobs import CONFIGS, Job, run_ours, run_peer
from tests.oracle.sweep import PAD, random_options

pytestmark = pytest.mark.oracle
NUM_SETTINGS = 60
LENGTHS = (3, 8, 5)


def write_prompts(path, rng, vocab):
    """A batch that is padded on the left or on the right."""
    ids, left = np.full((len(LENGTHS), max(LENGTHS)), PAD), rng.random() < 0.5
    for row, length in zip(ids, LENGTHS, strict=True):
        row[len(row) - length if left else 0 :][:length] = rng.integers(3, vocab, length)
    np.savez(path, input_ids=ids, attention_mask=(ids != PAD).astype(np.int64))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoding")
    for name, config in CONFIGS.items():
        write_random_checkpoint(folder / name, config, seed=len(name), scale=5.0)
    found = []
    for seed in range(NUM_SETTINGS):
        rng = np.random.default_rng([seed, 4])
        name, inputs = list(CONFIGS)[seed % len(CONFIGS)], folder / f"{seed}.npz"
        write_prompts(inputs, rng, CONFIGS[name].vocab_size)
        options = random_options(rng, CONFIGS[name].vocab_size)
        found.append(Job(str(folder / name), str(inputs), options=options))
    return found


@pytest.fixture(scope="module")
def expected(jobs, tmp_path_factory):
    return run_peer("hf437", "pt", jobs, tmp_path_factory.mktemp("expected"))


def filled(rows):
    """All sequences [any, new], filled with pads as in a batch."""
    new = [sequence for row in rows for sequence in row.tolist()]
    width = max(map(len, new))
    return [sequence + [PAD] * (width - len(sequence)) for sequence in new]


@pytest.mark.parametrize("framework", ["torch", "tf", "flax"])
def test_random_settings(framework, jobs, expected, tmp_path):
    """A padded batch gives the reference's tokens of each row alone, wherever those are no toss-up."""
    wrong, compared = {}, 0
    for seed, (job, found, rows) in enumerate(
        zip(jobs, run_ours(framework, jobs, tmp_path), expected, strict=True)
    ):
        if not rows["stable"]:
            continue
        compared += 1
        tokens = filled(rows[f"row/{index}"] for index in range(len(LENGTHS)))
        if found["new"].tolist() != tokens:
            wrong[seed] = (job.options, tokens, found["new"].tolist())
    assert not wrong, f"{len(wrong)} of {compared} settings differ:\n" + "\n".join(
        f"seed {seed}: {json.dumps(options)}\n  expected {tokens}\n  found    {new}"
        for seed, (options, tokens, new) in wrong.items()
    )
    assert compared >= 0.6 * NUM_SETTINGS
