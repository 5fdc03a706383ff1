# SPDX-License-Identifier: Apache-2.0
"""Texts packed into a row by positions that begin again: each is computed as if it were alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opt_core import OPTConfig
from tests.backends.base import Array, Backend
from tests.cases import case
from tests.reference.model import forward
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:attn_implementation=")
LENGTH = 9
#: Five rows, by the lengths of their texts, negative ones of pads.
FULL = ((4, 5), (1, 7, 1), (3, 3, 3), (9,), (1, 1, 2, 5))
PADDED = ((3, -1, 3, -2), (-2, 3, 4), (-1, 1, 1, 2, -4), (-3, 6), (2, 2, 5))
FIVE_TEXTS = ((-1, 3, 1, 2, -2), (4, 5), (-9,), (-9,), (-9,))
every_model = pytest.mark.parametrize("name", ["pre_norm", "post_norm"])


def packed(config: OPTConfig, rows: tuple[tuple[int, ...], ...]) -> dict[str, Array]:
    """Tokens, mask and positions [B, 9], and labels that count but for the first of each text."""
    random = np.random.default_rng(len(rows))
    ids = random.integers(3, config.vocab_size, (len(rows), LENGTH))
    pieces = [np.arange(n) if n > 0 else np.full(-n, -1) for row in rows for n in row]
    positions = np.concatenate(pieces).reshape(len(rows), LENGTH)
    return {
        "input_ids": np.where(positions < 0, config.pad_token_id, ids),
        "attention_mask": (positions >= 0).astype(np.int64),
        "position_ids": positions,
        "labels": np.where(positions < 1, -100, ids),
    }


def texts(rows: tuple[tuple[int, ...], ...]) -> list[tuple[int, slice]]:
    """The row and the columns of each text."""
    found = []
    for index, row in enumerate(rows):
        ends = np.cumsum(np.abs(row))
        found += [(index, slice(e - n, e)) for e, n in zip(ends, row, strict=True) if n > 0]
    return found


@every_model
@pytest.mark.parametrize("rows", [FULL, PADDED], ids=["full", "padded"])
def test_each_text_as_if_it_were_alone(
    backend: Backend, models: Any, name: str, rows: tuple[tuple[int, ...], ...]
) -> None:
    golden, batch = case(name), packed(case(name).config, rows)
    loss, count = 0.0, 0
    expected = []
    for row, columns in texts(rows):
        ids = batch["input_ids"][row : row + 1, columns]
        expected.append(forward(golden.config, golden.weights, input_ids=ids, labels=ids))
        if ids.size > 1:
            loss, count = loss + expected[-1]["loss"] * (ids.size - 1), count + ids.size - 1
    if rows is FULL:
        del batch["attention_mask"]
    for kernel in backend.kernels:
        found = backend.forward(models(name, attn_implementation=kernel), **batch, compiled=True)
        for (row, columns), alone in zip(texts(rows), expected, strict=True):
            what = f"{kernel}, row {row}, {columns}"
            assert_close(found["logits"][row, columns], alone["logits"][0], what)
        assert float(found["loss"]) == pytest.approx(loss / count, rel=1e-5)


def test_gradients_as_from_rows_of_their_own(backend: Backend, models: Any) -> None:
    """The same texts, one to a row, padded on the right."""
    batch = packed(case("pre_norm").config, FIVE_TEXTS)
    apart = {key: np.repeat(batch[key][4:], 5, axis=0) for key in batch if key != "position_ids"}
    for index, (row, columns) in enumerate(texts(FIVE_TEXTS)):
        for key, array in apart.items():
            array[index, : columns.stop - columns.start] = batch[key][row, columns]
    for kernel in backend.kernels:
        model = models("pre_norm", attn_implementation=kernel)
        expected, found = (
            backend.gradients(model, **each, compiled=True) for each in (apart, batch)
        )
        for parameter, gradient in found.items():
            if "k_proj.bias" not in parameter:  # zero, but for rounding
                assert_close(gradient, expected[parameter], f"{kernel}, {parameter}")


def test_one_row_of_positions_serves_all(backend: Backend, models: Any) -> None:
    batch = packed(case("pre_norm").config, ((4, 5),) * 5)
    one = {**batch, "position_ids": batch["position_ids"][:1]}
    model = models("pre_norm")
    expected, found = (
        backend.forward(model, **each, compiled=True)["logits"] for each in (batch, one)
    )
    assert_close(found, expected, "logits", tolerance=1e-6)


def test_positions_that_do_not_begin_again_change_nothing(backend: Backend, models: Any) -> None:
    """Those counted by hand, on either side of pads; those that begin later are no texts either."""
    name = "pre_norm"
    batch = packed(case(name).config, ((9,), (-3, 6), (6, -3), (-8, 1), (1, -8)))
    plain = {key: value for key, value in batch.items() if key != "position_ids"}
    real = batch["attention_mask"] == 1
    for kernel in backend.kernels:
        model = models(name, attn_implementation=kernel)
        expected = backend.forward(model, **plain)["logits"]
        found = backend.forward(model, **batch)["logits"]
        assert_close(found[real], expected[real], kernel, tolerance=1e-6)
        later = np.arange(3, 12)[None].repeat(5, axis=0)
        ids, every = {"input_ids": batch["input_ids"]}, np.ones_like(later)
        expected = backend.forward(model, **ids, position_ids=later, attention_mask=every)["logits"]
        found = backend.forward(model, **ids, position_ids=later)["logits"]
        assert_close(found, expected, kernel, tolerance=1e-6)
        seen = np.abs(found[0, 8] - backend.forward(model, **ids)["logits"][0, 8])
        assert seen.max() > 1e-3


def test_the_first_text_does_not_see_the_second(backend: Backend, models: Any) -> None:
    """Nor the second the first: another token there changes no number elsewhere."""
    batch = packed(case("pre_norm").config, ((4, 5),) * 5)
    before = backend.forward(models("pre_norm"), **batch)["logits"]
    for column, others in ((1, slice(4, 9)), (6, slice(0, 4))):
        ids = batch["input_ids"].copy()
        ids[:, column] = 3 + (ids[:, column] - 2) % 90
        after = backend.forward(models("pre_norm"), **{**batch, "input_ids": ids})["logits"]
        assert np.array_equal(after[:, others], before[:, others])
        assert not np.array_equal(after, before)
