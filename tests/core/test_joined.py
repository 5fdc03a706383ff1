# SPDX-License-Identifier: Apache-2.0
"""JoinedTensor: cut any array into pieces, join them, and every way of reading gives the array."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import arrays, same

from opt_core.checkpoints.joined import JoinedTensor
from opt_core.checkpoints.tensors import LazyTensor, TensorInfo
from opt_core.errors import FormatError, InputError


def joined(array: NDArray[Any], cuts: list[int], dim: int | None) -> JoinedTensor:
    """Cut `array` along `dim` (its flat elements if None) and join the pieces again."""
    whole = array.reshape(-1) if dim is None else array
    bounds = [0, *sorted(cuts), whole.shape[dim or 0]]
    parts = [
        LazyTensor.from_array("part", whole.take(range(a, b), dim or 0))
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    first = parts[0].info
    return JoinedTensor(TensorInfo("t", array.dtype, array.shape, first.file), parts, dim)


@st.composite
def pieces(draw: st.DrawFn) -> tuple[NDArray[Any], JoinedTensor]:
    array = draw(arrays())
    dim = draw(st.sampled_from([None, *range(array.ndim)]))
    length = array.size if dim is None else array.shape[dim]
    return array, joined(array, draw(st.lists(st.integers(0, length), max_size=4)), dim)


@given(pieces(), st.data())
def test_whole_blocks_slices_and_rows(
    pair: tuple[NDArray[Any], JoinedTensor], data: st.DataObject
) -> None:
    array, tensor = pair
    assert (tensor.name, tensor.dtype, tensor.shape) == ("t", array.dtype, array.shape)
    for found in (tensor.read(), tensor.map()):
        assert same(found, array)
        assert found.flags.c_contiguous and found.flags.writeable
    blocks = list(tensor.blocks(data.draw(st.integers(1, 64))))
    assert same(np.concatenate([b.reshape(-1) for b in blocks]), array.reshape(-1))
    if not array.ndim:
        return
    dim = data.draw(st.integers(0, array.ndim - 1))
    start = data.draw(st.integers(0, array.shape[dim]))
    stop = data.draw(st.integers(start, array.shape[dim]))
    assert same(tensor.read_slice(dim, start, stop), array.take(range(start, stop), dim))
    if dim == 0:
        rows = tensor.rows(start, stop)
        assert same(rows.read(), array[start:stop])
        middle = (stop - start) // 2
        assert same(rows.rows(middle, stop - start).read(), array[start + middle : stop])
        for cut in range(array[start:stop].ndim):
            middle = rows.shape[cut] // 2
            expected = array[start:stop].take(range(middle), cut)
            assert same(rows.read_slice(cut, 0, middle), expected)


def test_rows_of_flat_runs_side_by_side() -> None:
    """What metaseq needs: k, v, q are rows of a fused tensor of each part, which lies in runs."""
    k, v, q = np.arange(3 * 8 * 4, dtype=np.float16).reshape(3, 8, 4)
    halves = [np.concatenate([m[i : i + 4] for m in (k, v, q)]) for i in (0, 4)]
    fused = [joined(half, [5, 17, 40], None) for half in halves]
    found = JoinedTensor(
        TensorInfo("v", k.dtype, k.shape, fused[0].info.file), [f.rows(4, 8) for f in fused], 0
    )
    assert same(found.read(), v)
    assert same(np.concatenate(list(found.blocks(8))), v)
    assert same(found.rows(3, 6).read(), v[3:6])


def test_blocks_are_small_and_read_only_what_they_hold() -> None:
    array = np.arange(64, dtype=np.float32).reshape(16, 4)
    for dim in (0, 1, None):
        tensor = joined(array, [1, 3], dim)
        assert tensor.streams
        assert [b.shape for b in tensor.blocks(64)] == [(4, 4)] * 4
    turned = LazyTensor(
        TensorInfo("p", array.dtype, (4, 16), tensor.info.file),
        LazyTensor.from_array("", array)._source, 0, (1, 4),
    )  # fmt: skip
    tensor = JoinedTensor(turned.info, [turned.rows(0, 1), turned.rows(1, 4)], 0)
    assert not tensor.streams
    assert same(tensor.read(), array.T)
    assert same(np.concatenate(list(tensor.blocks(1))), array.T)


MISFITS: list[tuple[tuple[int, ...], list[tuple[int, ...]], int | None]] = [
    ((4, 2), [(2, 2), (1, 2)], 0),
    ((4, 2), [(2, 2), (3, 2)], 0),
    ((4, 2), [(4, 1), (3, 1)], 1),
    ((4, 2), [(2, 2), (2, 2)], 1),
    ((4, 2), [(4,), (4, 1)], 1),
    ((4, 2), [(7,)], None),
    ((4, 2), [(4, 2)], None),
    ((4, 2), [], 0),
    ((4, 2), [], None),
    ((4, 2), [(4, 2)], 2),
    ((4, 2), [(4, 2)], -1),
    ((), [()], 0),
]


@pytest.mark.parametrize(("shape", "parts", "dim"), MISFITS)
def test_parts_that_do_not_make_up_the_tensor(
    shape: tuple[int, ...], parts: list[tuple[int, ...]], dim: int | None
) -> None:
    lazy = [LazyTensor.from_array("p", np.zeros(part, np.float32)) for part in parts]
    info = LazyTensor.from_array("t", np.zeros(shape, np.float32)).info
    with pytest.raises(FormatError, match="tensor 't': expected parts that make up float32"):
        JoinedTensor(info, lazy, dim)


def test_parts_of_another_dtype() -> None:
    parts = [LazyTensor.from_array("p", np.zeros(2, kind)) for kind in (np.float32, np.float16)]
    info = LazyTensor.from_array("t", np.zeros(4, np.float32)).info
    with pytest.raises(FormatError, match=r"float32 \(4,\).*found a part of float16 \(2,\)"):
        JoinedTensor(info, parts, 0)


def test_a_slice_outside() -> None:
    tensor = joined(np.zeros((4, 2), np.float32), [2], 0)
    assert math.prod(tensor.shape) == 8
    for dim, start, stop in ((0, 3, 5), (2, 0, 0), (0, 2, 1)):
        with pytest.raises(InputError, match="expected a slice within shape"):
            tensor.read_slice(dim, start, stop)
    with pytest.raises(InputError, match="expected a slice within shape"):
        tensor.rows(0, 5)


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_parts_are_read_straight_into_place(dim: int) -> None:
    """Each level of joining with a block of its own took four blocks where one was planned for."""
    array = np.arange(2**22, dtype=np.float16).reshape(2048, 2048)
    halves = [joined(half, [2**20], None) for half in np.split(array, 2, dim)]
    tensor = JoinedTensor(
        TensorInfo("t", array.dtype, array.shape, halves[0].info.file), halves, dim
    )
    tracemalloc.start()
    try:
        found = tensor.read()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert same(found, array)
    assert peak < 1.75 * array.nbytes
