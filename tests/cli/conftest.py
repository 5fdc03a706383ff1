# SPDX-License-Identifier: Apache-2.0
"""A small random model with a tokenizer, and a runner for the command."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from opt_core import GenerationConfig, OPTConfig, OPTTokenizer
from opt_core.assets import TINY_SUMS
from opt_core.params import param_table
from opt_core.pretrained import save_pretrained
from opt_zoo.cli import app

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 48,
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = OPTTokenizer.from_pretrained(TINY_SUMS)
    config = OPTConfig(vocab_size=len(tokenizer), **SIZES)
    draw = np.random.default_rng(0).normal
    table = param_table(config)
    save_pretrained(
        directory,
        config,
        GenerationConfig.from_model_config(config),
        "OPTForCausalLM",
        [
            (
                p,
                np.dtype(np.float32),
                partial(lambda s: draw(0, 0.3, s).astype(np.float32), p.shape),
            )
            for p in table
        ],
        own_format="bin",
    )
    tokenizer.save_pretrained(directory)
    return directory


class Runner:
    """Runs the command in this process; workers are still processes of their own."""

    def __call__(self, *arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(app, list(arguments), input=input)


@pytest.fixture
def opt_zoo() -> Runner:
    return Runner()
