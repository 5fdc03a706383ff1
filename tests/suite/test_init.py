# SPDX-License-Identifier: Apache-2.0
"""Initial values, and what training does to a call: dropout and dropped layers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from opt_core import OPTConfig
from opt_core.params import Kind, param_table
from tests.backends.base import Array, Backend
from tests.cases import case
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:attn_implementation=")

STD = 0.05
CONFIG = OPTConfig(
    vocab_size=300,
    hidden_size=128,
    word_embed_proj_dim=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=160,
    max_position_embeddings=126,
    init_std=STD,
    tie_word_embeddings=False,
)
IDS = np.arange(3, 23).reshape(2, 10)


@pytest.fixture(scope="module")
def values(backend: Backend) -> dict[str, Array]:
    return backend.canonical_weights(backend.create(CONFIG, seed=1))


def test_matrices_are_normal(values: dict[str, Array]) -> None:
    """Each has at least 12,000 entries, so a standard deviation is known to 0.7 percent."""
    table = param_table(CONFIG)
    assert values.keys() == {param.name for param in table}
    for param in table:
        array = values[param.name]
        assert array.dtype == np.float32, param.name
        if param.spec.kind in (Kind.BIAS, Kind.NORM_BIAS):
            assert not array.any(), param.name
        elif param.spec.kind is Kind.NORM_SCALE:
            assert (array == 1).all(), param.name
        else:
            assert array.size > 12_000
            assert abs(array.std() / STD - 1) < 0.03, param.name
            assert abs(array.mean() / STD) < 0.05, param.name
            tails = np.mean(np.abs(array) > 2 * STD)  # 4.55 percent; a uniform has none
            assert 0.035 < tails < 0.056, param.name


def test_the_pad_row_is_zero_and_no_other(values: dict[str, Array]) -> None:
    tokens = values["model.decoder.embed_tokens.weight"]
    assert np.flatnonzero(~tokens.any(axis=1)).tolist() == [CONFIG.pad_token_id]
    assert values["model.decoder.embed_positions.weight"].any(axis=1).all()


def test_without_a_pad_token_no_row_is_zero(backend: Backend) -> None:
    model = backend.create(CONFIG.replace(pad_token_id=None))
    tokens = backend.canonical_weights(model)["model.decoder.embed_tokens.weight"]
    assert tokens.any(axis=1).all()


def test_no_two_matrices_are_alike(values: dict[str, Array]) -> None:
    """As they would be if two of them were drawn with one seed."""
    drawn = [array.ravel()[:50] for array in values.values() if array.std() > 0]
    assert len({array.tobytes() for array in drawn}) == len(drawn) == 2 * 6 + 5


def test_a_seed_says_which_values(backend: Backend, values: dict[str, Array]) -> None:
    same = backend.canonical_weights(backend.create(CONFIG, seed=1))
    other = backend.canonical_weights(backend.create(CONFIG, seed=2))
    name = "model.decoder.layers.0.fc1.weight"
    assert all(np.array_equal(same[key], values[key]) for key in values)
    assert not np.array_equal(other[name], values[name])


def test_a_base_model_is_initialised_too(backend: Backend) -> None:
    found = backend.canonical_weights(backend.create(CONFIG, architecture="OPTModel"))
    assert found.keys() == {param.name for param in param_table(CONFIG, "OPTModel")}
    assert abs(found["model.decoder.project_in.weight"].std() / STD - 1) < 0.03


# --- training -------------------------------------------------------------------------------------


def logits(backend: Backend, model: Any, **options: Any) -> Array:
    found: Array = backend.forward(model, input_ids=IDS, **options, compiled=True)["logits"]
    return found


@pytest.mark.parametrize("which", ["dropout", "attention_dropout"])
def test_dropout_in_training_only(backend: Backend, which: str) -> None:
    rates = {"dropout": 0.0, "attention_dropout": 0.0, which: 0.5}
    model = backend.load(case("pre_norm").folder, **rates)
    plain = backend.load(case("pre_norm").folder, dropout=0.0, attention_dropout=0.0)
    expected = logits(backend, plain)
    assert np.array_equal(logits(backend, model), expected)
    assert_close(logits(backend, plain, train=True), expected, "no dropout", tolerance=1e-6)
    first, second = (logits(backend, model, train=True, seed=seed) for seed in (1, 2))
    for trained, other in ((first, expected), (second, expected), (first, second)):
        assert np.abs(trained - other).max() > 0.1
    assert np.array_equal(logits(backend, model, train=True, seed=1), first)
    assert np.array_equal(logits(backend, model), expected)


@pytest.mark.parametrize("which", ["dropout", "attention_dropout"])
def test_dropout_scales_what_stays(backend: Backend, which: str) -> None:
    """On average over draws a layer adds what it adds without dropout; unscaled, it were half."""
    rates = {"dropout": 0.0, "attention_dropout": 0.0, which: 0.5}
    changes = {"num_hidden_layers": 1, "word_embed_proj_dim": 128, "_remove_final_layer_norm": True}
    model = backend.create(CONFIG.replace(**changes, **rates))

    def added(**options: Any) -> Array:
        flags = {"output_hidden_states": True, "compiled": True}
        found = backend.forward(model, input_ids=IDS, **flags, **options)
        return found["hidden_states"][1] - found["hidden_states"][0]

    plain = added()
    mean = np.mean([added(train=True, seed=seed) for seed in range(50)], axis=0)
    share = (mean * plain).sum() / (plain**2).sum()
    assert 0.7 < share < 1.3  # norms and activations after it are not linear


def test_attentions_are_shown_before_dropout(backend: Backend) -> None:
    model = backend.create(CONFIG.replace(attention_dropout=0.5))
    found = backend.forward(model, input_ids=IDS, train=True, output_attentions=True)
    sums = found["attentions"][0].sum(axis=-1)
    assert_close(sums, np.ones_like(sums), "rows of weights")


def test_every_layer_dropped(backend: Backend) -> None:
    """With layerdrop=1 a model in training is its embeddings and its head."""
    model = backend.load(case("pre_norm").folder, layerdrop=1.0, dropout=0.0)
    found = backend.forward(model, input_ids=IDS, train=True, output_hidden_states=True)
    hidden = found["hidden_states"]
    assert len(hidden) == 4
    assert all(np.array_equal(array, hidden[0]) for array in hidden[:3])
    plain = backend.forward(model, input_ids=IDS, output_hidden_states=True)
    assert np.array_equal(plain["hidden_states"][0], hidden[0])
    assert np.abs(plain["hidden_states"][1] - hidden[1]).max() > 0.1


def test_some_layers_dropped(backend: Backend) -> None:
    """Each layer by a draw of its own."""
    model = backend.load(case("pre_norm").folder, layerdrop=0.5, dropout=0.0)
    patterns = set()
    for seed in range(40):
        found = backend.forward(
            model, input_ids=IDS, train=True, seed=seed, output_hidden_states=True, compiled=True
        )
        hidden = found["hidden_states"]
        patterns.add(tuple(np.array_equal(*pair) for pair in itertools.pairwise(hidden)))
    assert len(patterns) == 4
