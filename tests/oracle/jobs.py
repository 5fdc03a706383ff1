# SPDX-License-Identifier: Apache-2.0
"""Runs the same jobs in the reference's environment and in ours, each framework in its own process.

A job is a folder of a checkpoint, an .npz of inputs and an .npz for the results; `peer.py` runs a
list of them with transformers, `ours.py` with one of our backends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import OPTConfig

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def _small(**changes: Any) -> OPTConfig:
    return OPTConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=32,
        **changes,
    )


#: Small models of each kind, for the files that others read.
CONFIGS = {
    "pre_norm": _small(),
    "post_norm": _small(do_layer_norm_before=False, word_embed_proj_dim=24),
    "untied": _small(tie_word_embeddings=False),
}


@dataclass(frozen=True)
class Job:
    """One forward call, and greedy decoding of `new_tokens` where that is not 0.

    Or, with options of `generate`, nothing but what they give.
    """

    checkpoint: str
    inputs: str  # input_ids and attention_mask, both [B, T]
    new_tokens: int = 0
    dtype: str = "float32"
    options: dict[str, Any] | None = None


def peer_python(name: str) -> Path:
    """The interpreter of a peer's environment; skips the test where there is none."""
    folder = os.environ.get("OPT_ZOO_PEERS")
    if not folder:
        pytest.skip("OPT_ZOO_PEERS is not set: run `make oracle`")
    python = Path(folder).resolve() / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment {name} in OPT_ZOO_PEERS: run `make oracle`")
    return python


def run_peer(
    name: str, framework: str, jobs: Sequence[Job], out: Path
) -> list[dict[str, np.ndarray]]:
    """Results of the peer `name` (hf437, hf457, hf5) in one of its frameworks (pt, tf, flax)."""
    # TF 2.19 needs the Keras 2 package for transformers 4.57.1; TF 2.15 has it inside.
    legacy = {"TF_USE_LEGACY_KERAS": "1"} if name == "hf457" else {}
    return _run([str(peer_python(name)), str(HERE / "peer.py"), framework], jobs, out, legacy)


def run_ours(framework: str, jobs: Sequence[Job], out: Path) -> list[dict[str, np.ndarray]]:
    """Results of our backend (torch, tf, flax)."""
    return _run([sys.executable, "-m", "tests.oracle.ours", framework], jobs, out)


def _run(
    command: list[str],
    jobs: Sequence[Job],
    out: Path,
    variables: Mapping[str, str] | None = None,
) -> list[dict[str, np.ndarray]]:
    out.mkdir(parents=True, exist_ok=True)
    (out / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    environment = {**os.environ, **(variables or {}), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*command, str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return [dict(np.load(out / f"{index}.npz")) for index in range(len(jobs))]


def relative_error(found: np.ndarray, expected: np.ndarray, mask: np.ndarray) -> float:
    """Largest difference at real tokens, relative to the largest expected number there."""
    real = mask.astype(bool)
    return float(np.abs(found - expected)[real].max() / np.abs(expected)[real].max())
