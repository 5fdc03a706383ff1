# SPDX-License-Identifier: Apache-2.0
"""The prompts of generation: checked, and moved to the right of their padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opt_core import GenerationConfig, InputError, OPTConfig
from opt_core.generation.plan import BUCKET, make_plan
from opt_core.generation.prompts import (
    GivenPrompts,
    bucketed,
    check_noise,
    check_prompts,
    check_seed,
    infers_mask,
    read_prompts,
)
from opt_core.inputs import PastShapes

MODEL = OPTConfig(vocab_size=30, hidden_size=8, num_attention_heads=2, max_position_embeddings=20)
OPTIONS = GenerationConfig(pad_token_id=1, bos_token_id=2, eos_token_id=2)
IDS = np.array([[5, 6], [7, 8]])


def read(ids: Any, mask: Any = None, options: GenerationConfig = OPTIONS, **given: Any) -> Any:
    ids = None if ids is None else np.array(ids)
    mask = None if mask is None else np.array(mask)
    return read_prompts(GivenPrompts(ids, mask, **given), options, MODEL)


def past(*shape: int, length: int | None = None, is_fixed: bool = False) -> PastShapes:
    """Each layer's key and value of one shape."""
    layers = MODEL.num_hidden_layers
    dtypes = (("float32", "float32"),) * layers
    return PastShapes(((shape, shape),) * layers, dtypes, is_fixed, length)


def test_a_mask_is_told_by_pads_that_are_no_ends() -> None:
    assert infers_mask(OPTIONS)
    assert not infers_mask(OPTIONS.replace(pad_token_id=2))
    assert not infers_mask(OPTIONS.replace(pad_token_id=None))
    assert not infers_mask(OPTIONS.replace(eos_token_id=(2, 1)))


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (IDS, np.array([[1, 1], [0, 2]]), "1 at real tokens and 0 at pads"),
        (IDS, np.array([[1, 1], [0, 0]]), "Row 1 .* all padding"),
        (IDS + 23, np.ones((2, 2), int), "token id 31, .* ids 0 to 29"),
        (IDS - 6, np.ones((2, 2), int), "token id -1"),
    ],
)
def test_prompts_that_do_not_fit(ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_prompts(ids, mask, MODEL)
    check_prompts(IDS, np.array([[1, 1], [0, 1]]), MODEL)


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(InputError, match=r"the shape of input_ids, \(2, 2\), found \(2, 3\)"):
        read(IDS, np.ones((2, 3), int))


def test_rows_stand_to_the_right_of_their_padding_in_their_order() -> None:
    ids = [[5, 6, 1, 1], [1, 5, 1, 6], [5, 6, 7, 8]]
    found = read(ids)
    assert found.tokens.tolist() == [[1, 1, 5, 6], [1, 1, 5, 6], [5, 6, 7, 8]]
    assert found.mask.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert found.given.tolist() == ids
    assert (found.lengths.columns, found.lengths.longest, found.lengths.is_padded) == (4, 4, True)


def test_a_mask_may_hide_tokens() -> None:
    found = read([[5, 6, 7]], [[1, 0, 1]])
    assert found.tokens.tolist() == [[6, 5, 7]] and found.mask.tolist() == [[0, 1, 1]]
    assert found.order.tolist() == [[1, 0, 2]]


def test_nothing_is_the_beginning_of_a_text() -> None:
    assert read(None).tokens.tolist() == [[2]]
    with pytest.raises(InputError, match="no bos_token_id"):
        read(None, options=OPTIONS.replace(bos_token_id=None))


def test_embeddings_alone_have_no_known_tokens() -> None:
    found = read(None, embeds_shape=(2, 3, 8))
    assert found.given is None and found.offset == 3
    assert found.known.tolist() == [[0] * 3] * 2 and found.mask.tolist() == [[1] * 3] * 2
    assert (found.lengths.columns, found.lengths.counted) == (3, 0)
    for shape in ((2, 3), (2, 0, 8), (2, 3, 7)):
        with pytest.raises(InputError, match="inputs_embeds: expected .*word_embed_proj_dim=8"):
            read(None, embeds_shape=shape)
    with pytest.raises(InputError, match="must be as many"):
        read(IDS, embeds_shape=(2, 3, 8))
    assert read(IDS, embeds_shape=(2, 2, 8)).given.tolist() == IDS.tolist()


def test_a_cache_must_leave_something_to_run() -> None:
    assert read([[5, 6, 7]], past=past(1, 2, 2, 4)).lengths.past == 2
    with pytest.raises(InputError, match="holds 3 tokens, and input_ids only 3"):
        read([[5, 6, 7]], past=past(1, 2, 3, 4))
    with pytest.raises(InputError, match="must be padded on the left"):
        read([[5, 6, 1]], past=past(1, 2, 1, 4))
    with pytest.raises(InputError, match="cannot be given together"):
        read([[5, 6]], past=past(1, 2, 1, 4), embeds_shape=(1, 2, 8))
    for shape in [(2, 2, 1, 4), (1, 4, 1, 4), (1, 2, 1, 8)]:
        with pytest.raises(
            InputError, match=r"key of layer 0: expected the shape \(1, 2, columns, 4\)"
        ):
            read([[5, 6]], past=past(*shape))


def test_how_much_of_a_fixed_cache_is_in_use_must_be_known() -> None:
    assert read([[5, 6, 7]], past=past(1, 2, 9, 4, length=2, is_fixed=True)).lengths.past == 2
    with pytest.raises(InputError, match="how many tokens it holds must be known"):
        read([[5, 6, 7]], past=past(1, 2, 9, 4, is_fixed=True))


def test_guides_are_a_second_half() -> None:
    """Without the prompts: their last token alone, or the negative prompts."""
    guided = OPTIONS.replace(guidance_scale=2.0)
    found = read([[5, 6, 7], [1, 8, 9]], options=guided)
    assert found.tokens.tolist() == [[5, 6, 7], [1, 8, 9]] * 2
    assert found.mask.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]
    assert found.known.shape == (2, 3) and found.lengths.is_padded
    negative = np.array([[3, 1], [3, 4]])
    found = read([[5, 6, 7], [1, 8, 9]], options=guided, negative_ids=negative)
    assert found.tokens[2:, 1:].tolist() == [[1, 3], [3, 4]]
    assert found.mask[2:].tolist() == [[0, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"negative_ids": np.array([[3]])}, "needs a guidance_scale"),
        ({"negative_ids": np.array([[3], [4]]), "scale": 2.0}, "expected 1 rows, .* found 2"),
        ({"past": past(1, 2, 1, 4), "scale": 2.0}, "guidance_scale needs input_ids alone"),
        ({"embeds_shape": (1, 2, 8), "scale": 2.0}, "guidance_scale needs input_ids alone"),
    ],
)
def test_guides_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    options = OPTIONS.replace(guidance_scale=given.get("scale"))
    with pytest.raises(InputError, match=message):
        read([[5, 6]], options=options, **{k: v for k, v in given.items() if k != "scale"})


def test_buckets_stand_before_the_prompts() -> None:
    prompts = read([[5, 6, 7], [1, 8, 9]])
    plan = make_plan(OPTIONS, MODEL, prompts.lengths)
    wide, found = bucketed(plan, prompts)
    assert found.tokens.shape == found.mask.shape == found.known.shape == (2, BUCKET)
    assert wide.prompt_length == BUCKET and found.offset == BUCKET - 3
    assert found.tokens[:, -3:].tolist() == prompts.tokens.tolist()
    assert not found.mask[:, :-3].any() and found.order is prompts.order


def test_sampling_is_decided_once() -> None:
    assert check_seed(None, None) is None
    assert type(check_seed(np.uint32(2**32 - 1), None)) is int
    for seed in (-1, 2**32, 1.5, True):
        with pytest.raises(InputError, match="seed: expected a whole number"):
            check_seed(seed, None)
    with pytest.warns(UserWarning, match="noise has no effect without do_sample=True"):
        check_seed(None, np.zeros(3), do_sample=False)
    with pytest.raises(InputError, match="seed or noise, not both"):
        check_seed(3, np.zeros(3))
    check_noise((7, 2, 30), (5, 2, 30))  # more steps than needed
    for shape in ((4, 2, 30), (5, 1, 30), (5, 2, 29)):
        with pytest.raises(InputError, match=r"noise: expected \(5, 2, 30\), found"):
            check_noise(shape, (5, 2, 30))
