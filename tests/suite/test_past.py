# SPDX-License-Identifier: Apache-2.0
"""`past_key_values`: what is accepted in every spelling, and what is refused, in calls and generate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from opt_core import InputError
from tests.backends.base import Array, Backend
from tests.cases import case
from tests.tolerances import TOLERANCES, assert_close

COLUMNS = 5  # of the past
POSITIONS = 40  # of the case pre_norm, which has 3 layers of 4 heads of 6 numbers
IDS = np.arange(3, 17).reshape(2, 7)
GREEDY = {"max_new_tokens": 2, "pad_token_id": 1, "eos_token_id": None}

Pairs = list[list[Array]]


@pytest.fixture(scope="module")
def model(backend: Backend) -> Any:
    return backend.load(case("pre_norm").folder)


@pytest.fixture(scope="module")
def whole(backend: Backend, model: Any) -> Array:
    return backend.forward(model, input_ids=IDS)["logits"][:, COLUMNS:]


@pytest.fixture
def pairs(backend: Backend, model: Any) -> Pairs:
    """Numpy's keys and values of the first columns, as lists of lists."""
    found = backend.forward(model, input_ids=IDS[:, :COLUMNS], use_cache=True)
    return [[np.array(x) for x in pair] for pair in found["past_key_values"]]


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def other(layer: int, part: int, value: Any) -> Callable[[Pairs], Any]:
    """The pairs with another key (part 0) or value (1) of a layer."""

    def change(pairs: Pairs) -> Any:
        pairs[layer][part] = value(pairs[layer][part]) if callable(value) else value
        return pairs

    return change


def every(change: Callable[[Array], Any]) -> Callable[[Pairs], Any]:
    return lambda pairs: [[change(x) for x in pair] for pair in pairs]


SPELLINGS: dict[str, Callable[[Pairs], Any]] = {
    "tuples": lambda pairs: tuple(tuple(pair) for pair in pairs),
    "lists": lambda pairs: pairs,
    "tuple of lists": tuple,
    "one array": np.array,
    "numbers of Python": lambda pairs: [[x.tolist() for x in pair] for pair in pairs],
    "that cannot be written to": every(lambda x: np.broadcast_to(x, x.shape)),
    "float64": every(lambda x: x.astype(np.float64)),
    "float16": every(lambda x: x.astype(np.float16)),
    "bfloat16": every(lambda x: x.astype(ml_dtypes.bfloat16)),
    "keys and values of two kinds": other(1, 1, lambda x: x.astype(np.float64)),
}
ROUGH = ("float16", "bfloat16")

SHAPE = r"\(2, 4, columns, 6\).*found"
SHAPE_5 = r"\(2, 4, 5, 6\).*found"
REFUSED: dict[str, tuple[Callable[[Pairs], Any], str]] = {
    "a number": (lambda pairs: 3, "for each layer a pair .*found int"),
    "a dict": (lambda pairs: dict(enumerate(pairs)), "for each layer a pair .*found dict"),
    "a string": (lambda pairs: "abc", "for each layer a pair .*found str"),
    "nothing": (lambda pairs: (), "expected 3 layers, found 0"),
    "too few layers": (lambda pairs: pairs[:1], "expected 3 layers, found 1"),
    "too many layers": (lambda pairs: [*pairs, pairs[0]], "expected 3 layers, found 4"),
    "a layer of none": (lambda pairs: [*pairs[:2], None], "found NoneType for layer 2"),
    "a layer of a dict": (
        lambda pairs: [*pairs[:2], {"key": pairs[2][0], "value": pairs[2][1]}],
        "found dict for layer 2",
    ),
    "a key alone": (lambda pairs: [*pairs[:2], pairs[2][:1]], "found 1 values for layer 2"),
    "four parts": (lambda pairs: [pairs[0] * 2, *pairs[1:]], "found 4 values for layer 0"),
    "no value": (other(1, 1, lambda x: None), "value of layer 1: expected .*found NoneType"),
    "words": (other(1, 0, lambda x: "abc"), "key of layer 1: expected .*found"),
    "ragged rows": (other(0, 0, lambda x: [[1.0], [1.0, 2.0]]), "key of layer 0: .*found list"),
    "whole numbers": (
        every(lambda x: x.astype(np.int64)),
        "key of layer 0: expected floating-point numbers, found .*int",
    ),
    "a value of truths": (
        other(2, 1, lambda x: x > 0),
        "value of layer 2: expected floating-point numbers, found .*bool",
    ),
    "rank of a key": (other(0, 0, zeros(2, 4, 30)), rf"key of layer 0: .*{SHAPE} \(2, 4, 30\)"),
    "rank of a value": (other(2, 1, zeros(2, 4, 6)), rf"value of layer 2: .*{SHAPE_5}"),
    "a number as a key": (other(0, 0, np.float32(1)), r"key of layer 0: .*found \(\)"),
    "rows of all": (every(lambda x: x[:1]), rf"key of layer 0: .*{SHAPE} \(1, 4, 5, 6\)"),
    "rows of beams": (
        every(lambda x: x.repeat(2, 0)),
        rf"key of layer 0: .*{SHAPE} \(4, 4, 5, 6\)",
    ),
    "rows of one layer": (other(1, 0, zeros(3, 4, 5, 6)), rf"key of layer 1: .*{SHAPE_5} \(3, "),
    "heads of all": (every(lambda x: x[:, :2]), rf"key of layer 0: .*{SHAPE} \(2, 2, 5, 6\)"),
    "heads of a value": (other(2, 1, zeros(2, 2, 5, 6)), rf"value of layer 2: .*{SHAPE_5} \(2, 2"),
    "one head for all": (every(lambda x: x[:, :1]), rf"key of layer 0: .*{SHAPE} \(2, 1, 5, 6\)"),
    "head size": (every(lambda x: x[..., :4]), rf"key of layer 0: .*{SHAPE} \(2, 4, 5, 4\)"),
    "head size of a value": (other(0, 1, zeros(2, 4, 5, 12)), rf"value of layer 0: .*{SHAPE_5}"),
    "as Flax has them": (
        every(lambda x: x.swapaxes(1, 2)),
        rf"key of layer 0: .*{SHAPE} \(2, 5, 4, 6\)",
    ),
    "a shorter value": (
        other(1, 1, lambda x: x[:, :, 1:]),
        rf"value of layer 1: .*{SHAPE_5} \(2, 4, 4, 6\)",
    ),
    "a longer layer": (
        lambda pairs: [*pairs[:2], [zeros(2, 4, 6, 6)] * 2],
        rf"key of layer 2: .*{SHAPE_5} \(2, 4, 6, 6\)",
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(backend: Backend, model: Any, pairs: Pairs, whole: Array, spelling: str) -> None:
    """Whatever their type, keys and values are taken in that of the computation."""
    past = SPELLINGS[spelling](pairs)
    found = backend.forward(model, input_ids=IDS[:, COLUMNS:], past_key_values=past, use_cache=True)
    dtype = spelling if spelling in ROUGH else "float32"
    assert_close(found["logits"], whole, spelling, tolerance=TOLERANCES[backend.name, dtype])
    kept = {
        str(x.dtype).removeprefix("torch.") for pair in found["raw"].past_key_values for x in pair
    }
    assert kept in ({"float32"}, {"<dtype: 'float32'>"})


@pytest.mark.parametrize("spelling", ["tuples", "one array", "float64", "bfloat16"])
def test_spellings_in_generate(backend: Backend, model: Any, pairs: Pairs, spelling: str) -> None:
    expected = backend.generate(model, IDS, **GREEDY)
    past = SPELLINGS[spelling](pairs)
    found = backend.generate(model, IDS, past_key_values=past, **GREEDY)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("what", REFUSED)
def test_refused(backend: Backend, model: Any, pairs: Pairs, what: str) -> None:
    change, message = REFUSED[what]
    past = change(pairs)
    message = f"(?s)past_key_values.*{message}"
    with pytest.raises(InputError, match=message):
        backend.forward(model, input_ids=IDS[:, COLUMNS:], past_key_values=past)
    with pytest.raises(InputError, match=message):
        backend.forward(
            model, inputs_embeds=zeros(2, 2, 24), past_key_values=past, attention_mask=IDS > 0
        )
    with pytest.raises(InputError, match=message):
        backend.generate(model, IDS, past_key_values=past, **GREEDY)
    with pytest.raises(InputError, match=message):
        backend.generate(model, IDS, past_key_values=past, num_beams=2, **GREEDY)


def test_refused_in_a_fixed_cache(backend: Backend, model: Any) -> None:
    cache = backend.init_cache(model, 2, 10)
    layers = cache.layers
    wrong: list[tuple[Any, str]] = [
        (replace(cache, layers=layers[:2]), "expected 3 layers, found 2"),
        (replace(cache, layers=()), "expected 3 layers, found 0"),
        (
            backend.init_cache(model, 1, 10),
            r"key of layer 0: .*\(2, 4, columns, 6\).*\(1, 4, 10, 6\)",
        ),
        (replace(cache, length=-1), "expected a length from 0 to 10.*found -1"),
        (replace(cache, length=11), "expected a length from 0 to 10.*found 11"),
        (
            replace(cache, layers=(*layers[:2], backend.init_cache(model, 2, 9).layers[2])),
            r"key of layer 2: .*\(2, 4, 10, 6\).*found \(2, 4, 9, 6\)",
        ),
        (
            replace(
                cache, layers=(type(layers[0])(layers[0].key, layers[0].value[:, :2]), *layers[1:])
            ),
            r"value of layer 0: .*\(2, 4, 10, 6\).*found \(2, 2, 10, 6\)",
        ),
    ]
    for past, message in wrong:
        with pytest.raises(InputError, match=f"past_key_values.*{message}"):
            backend.forward(model, input_ids=IDS, past_key_values=past)
        with pytest.raises(InputError, match=f"past_key_values.*{message}"):
            backend.generate(model, IDS, past_key_values=past, **GREEDY)


@pytest.mark.parametrize("columns", [7, 8])
def test_generate_needs_a_token_beyond_the_past(backend: Backend, model: Any, columns: int) -> None:
    past = [[zeros(2, 4, columns, 6)] * 2] * 3
    with pytest.raises(InputError, match=f"holds {columns} tokens, and input_ids only 7"):
        backend.generate(model, IDS, past_key_values=past, **GREEDY)


def test_a_past_beyond_the_position_table(backend: Backend, model: Any) -> None:
    past = [[zeros(2, 4, POSITIONS, 6)] * 2] * 3
    with pytest.raises(InputError, match="The sequence has 41 tokens"):
        backend.forward(model, input_ids=IDS[:, :1], past_key_values=past)
    ids = np.full((2, POSITIONS + 1), 5)
    with pytest.raises(InputError, match="position table"):
        backend.generate(model, ids, past_key_values=past, **GREEDY)


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_an_empty_past_is_none(backend: Backend, model: Any, fixed: bool) -> None:
    """Flax generated other tokens: pads before the prompt counted as cached tokens."""
    past = backend.init_cache(model, 2, 9) if fixed else [[zeros(2, 4, 0, 6)] * 2] * 3
    found = backend.forward(model, input_ids=IDS, past_key_values=past)["logits"]
    expected = backend.forward(model, input_ids=IDS)["logits"]
    assert_close(found, expected, "empty", tolerance=TOLERANCES[backend.name, "float32"])
    past = backend.init_cache(model, 2, 9) if fixed else past
    ids = np.where(np.arange(7) < [[7], [5]], IDS, 1)  # padded on the right
    found = backend.generate(model, ids, past_key_values=past, **GREEDY)
    assert np.array_equal(found, backend.generate(model, ids, **GREEDY))


def test_a_fixed_cache_of_another_dtype(backend: Backend, model: Any, whole: Array) -> None:
    """It becomes one of the computation's dtype, and the one given stays as it was."""
    narrow = backend.load(case("pre_norm").folder, dtype="bfloat16")
    start = backend.init_cache(narrow, 2, 10)
    first = backend.forward(model, input_ids=IDS[:, :COLUMNS], past_key_values=start)
    past = first["raw"].past_key_values
    assert "bfloat16" in str(start.layers[0].key.dtype)
    assert "float32" in str(past.layers[0].key.dtype)
    found = backend.forward(model, input_ids=IDS[:, COLUMNS:], past_key_values=past)["logits"]
    assert_close(found, whole, "fixed", tolerance=TOLERANCES[backend.name, "float32"])
    past = replace(start, length=first["raw"].past_key_values.length)
    assert backend.generate(model, IDS, past_key_values=past, **GREEDY).shape == (2, 9)
