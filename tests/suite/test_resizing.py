# SPDX-License-Identifier: Apache-2.0
"""Another number of tokens: `resize_token_embeddings`, and what works with the model afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import InputError
from tests.backends.base import Array, Backend
from tests.cases import bits, case

TABLE, HEAD = "decoder.embed_tokens.weight", "lm_head.weight"
every_model = pytest.mark.parametrize("name", ["pre_norm", "post_norm", "untied_gelu"])


def rows_of(weights: dict[str, Array]) -> dict[str, Array]:
    """The parameters with a row for each token."""
    return {name: a for name, a in weights.items() if name.endswith(TABLE) or name == HEAD}


@every_model
def test_more_tokens(backend: Backend, name: str) -> None:
    """Old rows stay to the bit, new ones are drawn, a head of its own as well, nothing else moves."""
    model = backend.load(case(name).folder)
    before, size = backend.canonical_weights(model), backend.config(model).vocab_size
    ids = np.array([[5, 6, 7, 8]])
    logits = backend.forward(model, input_ids=ids)["logits"]
    found = model.resize_token_embeddings(size + 200)
    assert type(found) is type(model.get_input_embeddings())
    assert backend.config(model).vocab_size == size + 200
    after = backend.canonical_weights(model)
    assert after.keys() == before.keys()
    resized = rows_of(after)
    assert len(resized) == (2 if name == "untied_gelu" else 1)
    for parameter, array in resized.items():
        assert array.shape == (size + 200, *before[parameter].shape[1:])
        assert np.array_equal(array[:size], before[parameter])
        drawn = array[size:]
        assert abs(drawn.mean()) < 0.002 and 0.018 < drawn.std() < 0.022  # init_std is 0.02
        assert len(np.unique(drawn)) > 0.99 * drawn.size
    kept = before.keys() - resized.keys()
    assert bits({n: after[n] for n in kept}) == bits({n: before[n] for n in kept})
    wider = backend.forward(model, input_ids=ids)["logits"]
    assert wider.shape == (1, 4, size + 200)
    np.testing.assert_allclose(wider[..., :size], logits, rtol=1e-5, atol=1e-6)


@every_model
def test_fewer_tokens(backend: Backend, name: str) -> None:
    model = backend.load(case(name).folder)
    before = backend.canonical_weights(model)
    model.resize_token_embeddings(50)
    for parameter, array in rows_of(backend.canonical_weights(model)).items():
        assert np.array_equal(array, before[parameter][:50])
    with pytest.raises(InputError, match="50"):
        backend.forward(model, input_ids=np.array([[50]]))


def test_rounded_up_and_left_alone(backend: Backend) -> None:
    model = backend.load(case("pre_norm").folder)
    before = bits(backend.canonical_weights(model))
    for options in ({}, {"new_num_tokens": 103}, {"pad_to_multiple_of": 103}):
        model.resize_token_embeddings(**options)
        assert bits(backend.canonical_weights(model)) == before
    for options, size in (
        ({"pad_to_multiple_of": 64}, 128),
        ({"new_num_tokens": 129, "pad_to_multiple_of": 8}, 136),
        ({"new_num_tokens": 104}, 104),
    ):
        model.resize_token_embeddings(**options)
        assert backend.config(model).vocab_size == size
        assert backend.forward(model, input_ids=np.array([[5]]))["logits"].shape[-1] == size


@pytest.mark.parametrize(
    "architecture", ["OPTModel", "OPTForSequenceClassification", "OPTForQuestionAnswering"]
)
def test_models_without_a_language_modelling_head(backend: Backend, architecture: str) -> None:
    config = case("post_norm").config.replace(vocab_size=99)  # a copy: resizing changes it
    model = backend.create(config, architecture=architecture)
    before = backend.canonical_weights(model)
    model.resize_token_embeddings(120)
    after = backend.canonical_weights(model)
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert [name.endswith(TABLE) for name in changed] == [True]
    backend.forward(model, input_ids=np.array([[119]]))


@every_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_loaded(backend: Backend, tmp_path: Path, name: str, dtype: str) -> None:
    model = backend.load(case(name).folder, dtype=dtype)
    model.resize_token_embeddings(130)
    backend.save(model, tmp_path)
    again = backend.load(tmp_path, dtype="auto")
    assert backend.config(again).vocab_size == 130
    found = backend.canonical_weights(again)
    assert bits(found) == bits(backend.canonical_weights(model))
    assert {str(array.dtype) for array in found.values()} == {dtype}


@pytest.mark.parametrize("name", ["pre_norm", "untied_gelu"])
def test_new_tokens_are_generated_and_learned(backend: Backend, name: str) -> None:
    """By `generate`, too, that was compiled before for the same lengths."""
    model: Any = backend.load(case(name).folder)
    prompt, options = np.array([[5, 6, 7]]), {"max_new_tokens": 2, "eos_token_id": None}
    old = backend.generate(model, prompt, **options)
    model.resize_token_embeddings(130)
    assert np.array_equal(backend.generate(model, prompt, **options), old)
    new = np.array([[125, 129, 7]])
    found = backend.generate(model, new, **options)
    logits = backend.forward(model, input_ids=found)["logits"][0]
    assert np.array_equal(logits[2:-1].argmax(axis=-1), found[0, 3:])
    batch = {"input_ids": new, "labels": np.array([[7, 5, 128]])}
    gradients = rows_of(backend.gradients(model, **batch, compiled=True))
    for parameter, gradient in gradients.items():
        assert gradient.shape[0] == 130
        moved = (gradient != 0).any(axis=-1)
        assert moved[128] if parameter == HEAD or name == "pre_norm" else moved[125]


BAD = {
    "no number": ({"new_num_tokens": "120"}, "new_num_tokens: expected a whole number from 1 on"),
    "none": ({"new_num_tokens": 0}, "found 0"),
    "half a multiple": ({"pad_to_multiple_of": 2.5}, "pad_to_multiple_of: expected a whole"),
    "fewer than the special tokens": ({"new_num_tokens": 2}, "_token_id is 2"),
}


@pytest.mark.parametrize("what", BAD)
def test_impossible_numbers(backend: Backend, models: Any, what: str) -> None:
    """Nothing has changed then."""
    options, message = BAD[what]
    model = models("pre_norm")
    before = bits(backend.canonical_weights(model))
    with pytest.raises(InputError, match=message):
        model.resize_token_embeddings(**options)
    assert bits(backend.canonical_weights(model)) == before
    assert backend.config(model).vocab_size == 103
