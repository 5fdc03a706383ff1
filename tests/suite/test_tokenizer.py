# SPDX-License-Identifier: Apache-2.0
"""The tokenizer's arrays in the backend's own framework, and back to text."""

from __future__ import annotations

import numpy as np
import pytest

from opt_core import InputError, OPTTokenizer
from opt_core.assets import TINY_SUMS
from tests.backends.base import Backend

TEXTS = ["two plus two is", "forty-two minus seventeen is"]
# backend -> (return_tensors, part of the name of the arrays' module, integer type)
ARRAYS = {
    "torch": ("pt", "torch", "int64"),
    "tf": ("tf", "tensorflow", "int32"),
    "flax": ("jax", "jax", "int32"),
}


def test_arrays_of_the_framework_and_back_to_text(backend: Backend) -> None:
    name, module, dtype = ARRAYS[backend.name]
    tokenizer = OPTTokenizer.from_pretrained(TINY_SUMS, padding_side="left")
    plain = tokenizer(TEXTS, padding=True, return_tensors="np")
    encoding = tokenizer(TEXTS, padding=True, return_tensors=name)
    for key, value in encoding.items():
        assert module in type(value).__module__ and dtype in str(value.dtype)
        assert np.array_equal(np.asarray(value), plain[key])
    ids = encoding.input_ids
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == TEXTS
    assert tokenizer.batch_decode(list(ids), skip_special_tokens=True) == TEXTS
    assert tokenizer.decode(ids[0], True) == TEXTS[0]
    assert tokenizer.decode(ids[0][-1]) == " is"
    assert tokenizer.pad({"input_ids": ids}, return_tensors="np").input_ids.shape == ids.shape
    assert tuple(tokenizer.encode("two", return_tensors=name).shape) == (1, 2)


def test_rows_of_unequal_length_make_no_array(backend: Backend) -> None:
    name, _, _ = ARRAYS[backend.name]
    tokenizer = OPTTokenizer.from_pretrained(TINY_SUMS)
    with pytest.raises(InputError, match="padding=True"):
        tokenizer(TEXTS, return_tensors=name)
