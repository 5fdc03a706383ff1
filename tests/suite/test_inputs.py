# SPDX-License-Identifier: Apache-2.0
"""Arguments of a call that fit, and the messages for those that do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opt_core import InputError
from tests.backends.base import Array, Backend
from tests.cases import case
from tests.tolerances import TOLERANCES, assert_close

pytestmark = pytest.mark.filterwarnings("ignore:attn_implementation=")

LAYERS, HEADS, VOCABULARY, EMBED, POSITIONS = 3, 4, 103, 24, 40  # of the case pre_norm
IDS = np.arange(3, 13).reshape(2, 5)
EMBEDS = np.zeros((2, 5, EMBED), np.float32)


def ones(*shape: int) -> Array:
    return np.ones(shape, np.int64)


def head_mask(*shape: int) -> Array:
    return np.ones(shape, np.float32)


@pytest.fixture(scope="module")
def model(backend: Backend) -> Any:
    return backend.load(case("pre_norm").folder)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({}, "You have to specify either decoder_input_ids or decoder_inputs_embeds"),
    "both": (
        {"input_ids": IDS, "inputs_embeds": EMBEDS},
        "cannot specify both decoder_input_ids and decoder_inputs_embeds at the same time",
    ),
    "rank of ids": ({"input_ids": IDS[0]}, r"input_ids: expected .*\(5,\)"),
    "rank of embeds": (
        {"inputs_embeds": EMBEDS[0]},
        r"inputs_embeds: expected the dimensions .*\(5, 24\)",
    ),
    "width of embeds": (
        {"inputs_embeds": EMBEDS[..., :8]},
        "word_embed_proj_dim=24 numbers, found 8",
    ),
    "rank of mask": (
        {"input_ids": IDS, "attention_mask": ones(2, 1, 5, 5)},
        "attention_mask: expected the dimensions",
    ),
    "length of mask": (
        {"input_ids": IDS, "attention_mask": ones(2, 4)},
        "The provided attention mask has length 4, but its length should be 5 "
        r"\(sum of the lengths of current and past inputs\)",
    ),
    "batch of mask": ({"input_ids": IDS, "attention_mask": ones(3, 5)}, "attention_mask"),
    "layers of head mask": (
        {"input_ids": IDS, "head_mask": head_mask(2, HEADS)},
        "The `head_mask` should be specified for 3 layers, but it is for 2",
    ),
    "heads of head mask": (
        {"input_ids": IDS, "head_mask": head_mask(LAYERS, 3)},
        r"Head mask for a single layer should be of size \(4,\), but is \(3,\)",
    ),
    "rank of head mask": ({"input_ids": IDS, "head_mask": head_mask(LAYERS)}, "Head mask"),
    "shape of positions": (
        {"input_ids": IDS, "position_ids": ones(2, 4)},
        r"position_ids: expected the shape \(2, 5\), found \(2, 4\)",
    ),
    "large id": (
        {"input_ids": IDS + VOCABULARY},
        f"token id {IDS.max() + VOCABULARY}, but the vocabulary has the ids 0 to 102",
    ),
    "negative id": ({"input_ids": IDS - 4}, "token id -1"),
    "too long": (
        {"input_ids": ones(1, POSITIONS + 1)},
        "The sequence has 41 tokens, but the position table only 40",
    ),
    "large position": (
        {"input_ids": IDS, "position_ids": np.full((2, 5), POSITIONS)},
        "position_ids holds 40, but the position table has the positions 0 to 39",
    ),
    "negative position": (
        {"input_ids": IDS, "position_ids": np.full((2, 5), -2)},
        "position_ids holds -2",
    ),
}


WIDE = 2**32 + 5  # whose lower 32 bits are a valid id, position and label


def with_wide(shape: tuple[int, ...], number: int = WIDE) -> Array:
    values = np.ones(shape, np.int64)
    values[0, -1] = number
    return values


BEYOND_32_BITS: dict[str, tuple[dict[str, Any], str]] = {
    "id": ({"input_ids": with_wide((2, 5))}, "input_ids holds"),
    "negative id": ({"input_ids": with_wide((2, 5), -(2**32))}, "input_ids holds"),
    "position": ({"input_ids": IDS, "position_ids": with_wide((2, 5))}, "position_ids holds"),
    "label": ({"input_ids": IDS, "labels": with_wide((2, 5))}, "labels holds"),
    "negative label": (
        {"input_ids": IDS, "labels": with_wide((2, 5), -100 - 2**32)},
        "labels holds",
    ),
}


@pytest.mark.parametrize("what", BEYOND_32_BITS)
def test_numbers_beyond_32_bits(backend: Backend, model: Any, what: str) -> None:
    """JAX and TensorFlow cut such numbers without a word: 2**32 + 5 was the id 5."""
    inputs, message = BEYOND_32_BITS[what]
    with pytest.raises(InputError, match=f"{message} .*(42949672|42949673)"):
        backend.forward(model, **inputs)


@pytest.mark.parametrize("number", [2**32, WIDE, -(2**40), 2**70])
def test_prompts_beyond_32_bits(backend: Backend, model: Any, number: int) -> None:
    ids = [[3, 4, number]]
    given = [ids] if backend.name == "torch" or number == 2**70 else [ids, np.array(ids)]
    for rows in given:
        with pytest.raises(InputError, match="input_ids"):
            backend.generate(model, rows, max_new_tokens=2)
    with pytest.raises(InputError, match="negative_prompt_ids.*input_ids"):
        backend.generate(
            model, IDS[:1], negative_prompt_ids=ids, guidance_scale=2.0, max_new_tokens=2
        )
    with pytest.raises(InputError, match="attention_mask"):
        backend.generate(model, IDS[:1, :3], attention_mask=ids, max_new_tokens=2)
    with pytest.raises(InputError, match="eos_token_id"):
        backend.generate(model, IDS, eos_token_id=number, max_new_tokens=2)


@pytest.mark.parametrize("what", ERRORS)
def test_messages(backend: Backend, model: Any, what: str) -> None:
    inputs, message = ERRORS[what]
    with pytest.raises(InputError, match=message):
        backend.forward(model, **inputs)


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_messages_with_a_past(backend: Backend, model: Any, fixed: bool) -> None:
    past = backend.init_cache(model, 2, 10) if fixed else None
    start = backend.forward(model, input_ids=IDS, past_key_values=past, use_cache=True)
    past = start["raw"]["past_key_values"]
    inputs: dict[str, Any] = {"input_ids": IDS, "past_key_values": past}
    with pytest.raises(InputError, match="has length 5, but its length should be 10"):
        backend.forward(model, **inputs, attention_mask=ones(2, 5))
    if fixed:
        with pytest.raises(
            InputError, match="room for 10 tokens, but 5 are in it and 6 were given"
        ):
            backend.forward(model, **{**inputs, "input_ids": ones(2, 6)})
    else:
        with pytest.raises(InputError, match="The sequence has 41 tokens"):
            backend.forward(model, **{**inputs, "input_ids": ones(2, 36)})


def test_an_unknown_kernel(backend: Backend) -> None:
    with pytest.raises(InputError, match="attn_implementation 'fast'.*'eager'"):
        backend.load(case("pre_norm").folder, attn_implementation="fast")


def test_the_whole_position_table_can_be_used(backend: Backend, model: Any) -> None:
    found = backend.forward(model, input_ids=np.full((1, POSITIONS), 5))
    assert np.isfinite(found["logits"]).all()


@pytest.mark.parametrize("situation", ["left", "mixed"])
def test_positions_may_be_given_instead_of_counted(
    backend: Backend, model: Any, situation: str
) -> None:
    golden = case("pre_norm")
    inputs = golden.inputs(situation)
    mask, real = inputs["attention_mask"], golden.real(situation)
    positions = np.cumsum(mask, axis=1) * mask - 1  # -1 at pads
    found = backend.forward(model, **inputs, position_ids=positions)
    tolerance = TOLERANCES[backend.name, "float32"]
    expected = golden.outputs(situation)["logits"]
    assert_close(found["logits"][real], expected[real], situation, tolerance=tolerance)
    shifted = backend.forward(model, **inputs, position_ids=positions + 1)["logits"]
    assert np.abs(shifted - expected)[real].max() > 0.1


@pytest.mark.parametrize("name", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("situation", ["left", "right", "mixed"])
def test_pads_read_row_one(backend: Backend, models: Any, name: str, situation: str) -> None:
    """What enters the first layer is the reference's at pads too: token plus position row."""
    golden = case(name)
    found = backend.forward(models(name), **golden.inputs(situation), output_hidden_states=True)
    expected = golden.outputs(situation)["hidden_states"][0]
    tolerance = TOLERANCES[backend.name, "float32"]
    assert_close(found["hidden_states"][0], expected, situation, tolerance=tolerance)


def test_packed_positions_may_start_again(backend: Backend, model: Any) -> None:
    """Two texts in one row: the first is as alone, the second has positions of its own."""
    ids = np.arange(3, 10)[None]
    positions = np.array([[0, 1, 2, 3, 0, 1, 2]])
    found = backend.forward(model, input_ids=ids, position_ids=positions)["logits"]
    alone = backend.forward(model, input_ids=ids[:, :4])["logits"]
    counted = backend.forward(model, input_ids=ids)["logits"]
    tolerance = TOLERANCES[backend.name, "float32"]
    assert_close(found[:, :4], alone, "the first text", tolerance=tolerance)
    assert np.abs(found - counted)[:, 4:].max() > 0.1


def test_positions_may_repeat_beyond_the_table(backend: Backend, model: Any) -> None:
    """A row longer than the table is right if its positions are given."""
    ids = np.full((1, POSITIONS + 5), 7)
    positions = (np.arange(POSITIONS + 5) % 20)[None]
    found = backend.forward(model, input_ids=ids, position_ids=positions)
    assert np.isfinite(found["logits"]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.bool_, np.float32])
def test_masks_of_any_number_type(backend: Backend, model: Any, dtype: Any) -> None:
    golden = case("pre_norm")
    inputs = golden.inputs("left")
    inputs["attention_mask"] = inputs["attention_mask"].astype(dtype)
    expected, real = golden.outputs("left")["logits"], golden.real("left")
    found = backend.forward(model, **inputs)["logits"]
    tolerance = TOLERANCES[backend.name, "float32"]
    assert_close(found[real], expected[real], str(dtype), tolerance=tolerance)


def test_ids_of_32_bits(backend: Backend, model: Any) -> None:
    golden = case("pre_norm")
    ids = golden.inputs("unpadded")["input_ids"].astype(np.int32)
    found = backend.forward(model, input_ids=ids)["logits"]
    tolerance = TOLERANCES[backend.name, "float32"]
    assert_close(found, golden.outputs("unpadded")["logits"], "int32", tolerance=tolerance)


def test_a_row_of_pads_changes_no_other_row(backend: Backend, model: Any) -> None:
    golden = case("pre_norm")
    inputs = golden.inputs("left")
    mask = inputs["attention_mask"].copy()
    mask[1] = 0
    flags = {"output_hidden_states": True, "output_attentions": True}
    found = backend.forward(model, input_ids=inputs["input_ids"], attention_mask=mask, **flags)
    real = mask == 1
    tolerance = TOLERANCES[backend.name, "float32"]
    expected = golden.outputs("left")["logits"]
    assert_close(found["logits"][real], expected[real], "other rows", tolerance=tolerance)
    for key in ("hidden_states", "attentions"):
        assert all(np.isfinite(array).all() for array in found[key])


def test_labels_that_are_all_ignored(backend: Backend, model: Any) -> None:
    """The mean of nothing is NaN, as in the reference."""
    found = backend.forward(model, input_ids=IDS, labels=np.full_like(IDS, -100))
    assert np.isnan(found["loss"]).all()
