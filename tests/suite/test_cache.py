# SPDX-License-Identifier: Apache-2.0
"""Decoding through a cache: however a text is cut into calls, the logits are the same."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opt_core import InputError
from tests.backends.base import Array, Backend
from tests.cases import case
from tests.reference.model import forward
from tests.tolerances import TOLERANCES, assert_close

LENGTH = 6  # each part of it is a shape to compile
IDS = np.random.default_rng(0).integers(3, 99, (2, LENGTH))

splits = st.sets(st.integers(1, LENGTH - 1)).map(lambda cuts: [0, *sorted(cuts), LENGTH])
# Real tokens are few or many, at either end or with holes; the first row has no pads.
masks = st.lists(st.integers(0, 1), min_size=LENGTH, max_size=LENGTH).map(
    lambda row: np.array([[1] * LENGTH, row])
)
examples = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check(backend: Backend, name: str, found: list[Array], mask: Array) -> None:
    """The steps' logits together, against the specification of the whole."""
    golden = case(name)
    expected = forward(golden.config, golden.weights, IDS, attention_mask=mask)["logits"]
    assert_close(
        np.concatenate(found, axis=1)[mask == 1],
        expected[mask == 1],
        f"{name} {[part.shape[1] for part in found]}",
        tolerance=TOLERANCES[backend.name, "float32"],
    )


@examples
@given(cuts=splits, mask=masks)
def test_a_growing_cache(backend: Backend, models: Any, cuts: list[int], mask: Array) -> None:
    model, found, past = models("post_norm"), [], None
    for start, stop in itertools.pairwise(cuts):
        step = {"input_ids": IDS[:, start:stop], "attention_mask": mask[:, :stop]}
        output = backend.forward(model, **step, past_key_values=past, use_cache=True, compiled=True)
        found.append(output["logits"])
        past = output["raw"]["past_key_values"]
        assert [key.shape[2] for key, value in output["past_key_values"]] == [stop] * len(past)
    check(backend, "post_norm", found, mask)


@examples
@given(cuts=splits, mask=masks, whole_mask=st.booleans())
def test_a_fixed_cache(
    backend: Backend, models: Any, cuts: list[int], mask: Array, whole_mask: bool
) -> None:
    """The mask may have the columns so far, or one for each column of the cache."""
    model, capacity = models("pre_norm"), LENGTH + 2
    padded = np.concatenate([mask, np.ones((2, 2), mask.dtype)], axis=1)
    found, past = [], backend.init_cache(model, 2, capacity)
    for start, stop in itertools.pairwise(cuts):
        given_mask = padded if whole_mask else mask[:, :stop]
        step = {"input_ids": IDS[:, start:stop], "attention_mask": given_mask}
        output = backend.forward(model, **step, past_key_values=past, use_cache=True, compiled=True)
        found.append(output["logits"])
        past = output["raw"]["past_key_values"]
    check(backend, "pre_norm", found, mask)


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_without_a_mask(backend: Backend, models: Any, fixed: bool) -> None:
    """All tokens are real: several queries after a past see it all, and each other causally."""
    found, past = [], backend.init_cache(models("pre_norm"), 2, 12) if fixed else None
    for start, stop in ((0, 2), (2, 5), (5, 6)):
        ids = IDS[:, start:stop]
        output = backend.forward(
            models("pre_norm"), input_ids=ids, past_key_values=past, use_cache=True, compiled=True
        )
        found.append(output["logits"])
        past = output["raw"]["past_key_values"]
    check(backend, "pre_norm", found, np.ones_like(IDS))


@pytest.mark.parametrize("name", ["pre_norm", "post_norm"])
def test_the_pairs_of_the_reference_are_accepted(backend: Backend, models: Any, name: str) -> None:
    """`past_key_values` as transformers gives it: per layer (key, value), each [B, N, S, H]."""
    golden = case(name)
    pairs = tuple(golden.outputs("unpadded")["past_key_values"])
    ids = golden.inputs("unpadded")["input_ids"]
    later = np.array([[4, 9], [5, 8], [6, 7]])
    whole = np.concatenate([ids, later], axis=1)
    expected = forward(golden.config, golden.weights, whole)["logits"][:, -2:]
    found = backend.forward(models(name), input_ids=later, past_key_values=pairs, use_cache=True)
    assert_close(found["logits"], expected, name, tolerance=TOLERANCES[backend.name, "float32"])
    assert found["past_key_values"][0][0].shape == (*pairs[0][0].shape[:2], 9, pairs[0][0].shape[3])


def test_a_growing_cache_is_not_written_to(backend: Backend, models: Any) -> None:
    """One prefix may be continued in two ways."""
    model = models("post_norm")
    start = backend.forward(model, input_ids=IDS[:, :4], use_cache=True)["raw"]["past_key_values"]
    other = (IDS[:, 4:] + 1) % 99
    first = backend.forward(model, input_ids=IDS[:, 4:], past_key_values=start)["logits"]
    backend.forward(model, input_ids=other, past_key_values=start)
    again = backend.forward(model, input_ids=IDS[:, 4:], past_key_values=start)["logits"]
    assert np.array_equal(first, again)


def test_embeddings_may_follow_a_cache(backend: Backend, models: Any) -> None:
    golden = case("post_norm")
    table = golden.weights["model.decoder.embed_tokens.weight"]
    model = models("post_norm")
    past = backend.forward(model, input_ids=IDS[:, :5], use_cache=True)["raw"]["past_key_values"]
    found = backend.forward(model, inputs_embeds=table[IDS[:, 5:]], past_key_values=past)
    expected = forward(golden.config, golden.weights, IDS)["logits"][:, 5:]
    assert_close(
        found["logits"], expected, "embeddings", tolerance=TOLERANCES[backend.name, "float32"]
    )


def test_a_cache_of_another_model_is_refused(backend: Backend, models: Any) -> None:
    golden = case("pre_norm")
    ids = golden.inputs("unpadded")["input_ids"]
    pairs = backend.forward(models("pre_norm"), input_ids=ids)["raw"]["past_key_values"]
    with pytest.raises(InputError, match="past_key_values: expected 3 layers, found 1"):
        backend.forward(models("pre_norm"), input_ids=ids, past_key_values=tuple(pairs)[:1])
