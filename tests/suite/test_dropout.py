# SPDX-License-Identifier: Apache-2.0
"""Rates of dropout, attention dropout and dropped layers in training, and nothing of it in evaluation.

The weights are such that a layer adds only what is counted: 1 after each of its two dropouts, or the
share of attention that is left. Bounds are five standard deviations of what a fair coin does, or the
chi-square that it exceeds once in a million times.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import OPTConfig
from opt_core.params import param_table
from tests.backends.base import Array, Backend
from tests.cases import write

pytestmark = pytest.mark.filterwarnings("ignore:attn_implementation=")
CONFIG = OPTConfig(
    vocab_size=11,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=8,
    ffn_dim=4,
    max_position_embeddings=32,
    _remove_final_layer_norm=True,
    dropout=0.0,
    pad_token_id=0,
)
IDS = np.random.default_rng(0).integers(3, 11, (8, 24))
#: Exceeded with a probability of 1e-6, by degrees of freedom.
CHI_SQUARE = {1: 23.9, 2: 27.6, 3: 30.7}


@pytest.fixture
def make(backend: Backend, tmp_path: Path) -> Callable[..., Any]:
    """A model of zeros, but for the parameters whose names end with a key of `filled`."""

    def load(filled: dict[str, Any], attn_implementation: str = "eager", **changes: Any) -> Any:
        config = CONFIG.replace(**changes)
        weights = {p.name: np.zeros(p.shape, np.float32) for p in param_table(config)}
        for name, array in weights.items():
            for end, value in filled.items():
                if name.endswith(end):
                    array[...] = value
        folder = write(tmp_path / "model", weights, config)
        return backend.load(folder, attn_implementation=attn_implementation)

    return load


def added(
    backend: Backend, model: Any, *, ids: Array = IDS, train: bool = True, seed: int = 0
) -> Array:
    """What each layer adds to its input: [layers, B, T, D]."""
    flags = {"train": train, "output_hidden_states": True, "use_cache": False, "compiled": True}
    output = backend.forward(model, input_ids=ids, seed=seed, **flags)
    return np.diff(np.stack(output["hidden_states"]), axis=0)


def assert_rate(kept: Array, rate: float) -> None:
    """Of draws, of which 1 - `rate` are to be kept."""
    error = abs(kept.mean() - (1 - rate))
    assert error < 5 * np.sqrt(rate * (1 - rate) / kept.size), kept.mean()


def assert_fair(counts: Array, chances: Array) -> None:
    expected = counts.sum() * np.asarray(chances)
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE[len(counts) - 1], counts


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_each_number_is_dropped_by_itself(backend: Backend, make: Any, rate: float) -> None:
    """After attention and after the feed-forward: zero, one or both of them are left, scaled up."""
    model = make({"out_proj.bias": 1, "fc2.bias": 1}, dropout=rate)
    kept = added(backend, model) * (1 - rate)  # [2, B, T, D] of 0, 1, 2
    whole = kept.round()
    np.testing.assert_allclose(kept, whole, atol=1e-5)
    counts = np.bincount(whole.astype(int).ravel(), minlength=3)
    chances = np.array([rate**2, 2 * rate * (1 - rate), (1 - rate) ** 2])
    assert_fair(counts, chances)
    # Any two of them that lie apart in one direction know nothing of each other.
    for axis in range(4):
        ahead, behind = np.split(whole - 2 * (1 - rate), 2, axis=axis)
        product = (ahead * behind).mean() / (2 * rate * (1 - rate))
        assert abs(product) < 5 / np.sqrt(ahead.size), f"axis {axis}"


@pytest.mark.parametrize("rate", [0.2, 0.6])
def test_each_weight_of_attention_is_dropped_by_itself(
    backend: Backend, make: Any, rate: float
) -> None:
    """All values are 1 and all weights alike: what a head reads tells how many of them it kept."""
    for kernel in backend.kernels:
        filled = {"v_proj.bias": 1, "out_proj.weight": np.eye(32)}
        model = make(filled, kernel, attention_dropout=rate)
        heads = added(backend, model).reshape(2, 8, 24, 8, 4)  # [layers, B, T, N, H]
        assert (heads == heads[..., :1]).all()
        keys = np.arange(1, 25)[:, None]  # that a query sees
        kept = heads[..., 0] * keys * (1 - rate)  # [layers, B, T, N]
        whole = kept.round()
        np.testing.assert_allclose(kept, whole, atol=1e-4)
        error = abs(whole.sum() / (whole.size * keys.mean()) - (1 - rate))
        assert error < 5 * np.sqrt(rate * (1 - rate) / (whole.size * keys.mean()))
        assert_rate(whole[:, :, 0], rate)
        pairs = np.bincount(whole[:, :, 1].astype(int).ravel(), minlength=3)
        assert_fair(pairs, np.array([rate**2, 2 * rate * (1 - rate), (1 - rate) ** 2]))


def test_each_layer_is_dropped_by_itself(backend: Backend, make: Any) -> None:
    """For a whole batch, as often at either end, and without scaling up what is left."""
    rate, layers = 0.4, 24
    model = make({"fc2.bias": 1}, layerdrop=rate, num_hidden_layers=layers)
    runs = np.stack([added(backend, model, ids=IDS[:2, :2], seed=seed) for seed in range(16)])
    kept = runs[..., 0, 0, 0]  # [runs, layers]
    assert set(np.unique(kept)) == {0.0, 1.0}
    assert (runs == kept[..., None, None, None]).all()
    assert_rate(kept, rate)
    assert_rate(kept[:, : layers // 2], rate)
    assert_rate(kept[:, layers // 2 :], rate)
    assert len(np.unique(kept, axis=0)) == 16


RATES = {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.3}
FILLED = {"v_proj.bias": 1, "out_proj.weight": np.eye(32), "fc2.bias": 1}


def test_seeds_reproduce_what_is_dropped(backend: Backend, make: Any) -> None:
    model = make(FILLED, **RATES, num_hidden_layers=4)
    first, again, other = (added(backend, model, seed=seed) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_nothing_is_dropped_in_evaluation(backend: Backend, make: Any) -> None:
    """Whatever the seed, nor without rates in training."""
    model = make(FILLED, **RATES)
    for seed in (1, 2):
        np.testing.assert_allclose(added(backend, model, train=False, seed=seed), 2, rtol=1e-6)
    plain = make(FILLED)
    np.testing.assert_allclose(added(backend, plain), 2, rtol=1e-6)
