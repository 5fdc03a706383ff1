# SPDX-License-Identifier: Apache-2.0
"""The prompts of `generate`: checked, and moved to the right of their padding, once for all backends.

Arrays are numpy's, or traced ones of a namespace that is numpy's twin, whose values cannot be checked.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.plan import DecodePlan, PromptLengths, S
from opt_core.inputs import PastShapes, Shape, check_ids, check_past


@dataclass(frozen=True)
class Prompts:
    """Prompts to the right of their padding.

    Attributes:
        given: [B, T] token ids in the order in which they were given; None of embeddings alone.
        tokens: [B or 2B, T]; the second half, if there is one, guides without the prompt.
        mask: [B or 2B, T], 1 at real tokens, 0 at pads.
        known: [B, T], the mask of columns whose tokens are known, not embeddings alone.
        order: [B, T], the column that each column came from.
        offset: columns before the first that counts.
        lengths: what a plan must know; they do not count the pads of `bucketed`.
    """

    given: Any
    tokens: Any
    mask: Any
    known: Any
    order: Any
    offset: int
    lengths: PromptLengths


@dataclass(frozen=True)
class GivenPrompts:
    """The prompts among the arguments of `generate`; arrays or None.

    Attributes:
        embeds_shape: [B, T, E] of `inputs_embeds`, where given.
        past: the shapes of `past_key_values`, where given.
    """

    input_ids: Any
    attention_mask: Any
    embeds_shape: Shape | None = None
    past: PastShapes | None = None
    negative_ids: Any = None
    negative_mask: Any = None

    @property
    def past_length(self) -> int:
        """The columns of `past_key_values`."""
        return 0 if self.past is None else self.past.used or 0


def read_prompts(
    given: GivenPrompts, options: GenerationConfig, config: OPTConfig, xp: Any = np
) -> Prompts:
    """The prompts that a loop starts from.

    Args:
        xp: numpy, or the namespace of traced arrays.

    Raises:
        InputError: prompts that are not a batch of token ids, nor fit the model, the mask or the cache;
            a row without a single real token.
    """
    embeds_only = given.input_ids is None and given.embeds_shape is not None
    if embeds_only:
        _check_embeds(given.embeds_shape or (), config)
        tokens = xp.full(given.embeds_shape[:2], options.pad_token_id or 0)  # type: ignore[index]
    else:
        ids = start_of_text(options) if given.input_ids is None else given.input_ids
        tokens = _read("input_ids", ids, xp)
        check_prompt_shape(tokens.shape, str(tokens.dtype))
        _check_with_embeds(tokens.shape, given)
    mask = given.attention_mask
    if mask is None and infers_mask(options) and not embeds_only:
        mask = tokens != options.pad_token_id
    mask = xp.ones_like(tokens) if mask is None else _read("attention_mask", mask, xp)
    check_mask_shape(mask.shape, tokens.shape)
    is_padded, longest = True, tokens.shape[1]
    if xp is np:
        check_prompts(tokens, mask, config)
        is_padded, longest = not mask.all(), int(mask.sum(axis=1).max())
    tokens, mask = tokens.astype(np.int32), mask.astype(np.int32)
    ids = None if embeds_only else tokens
    order = xp.argsort(mask, axis=1, stable=True)  # [B, T]
    if given.past is not None:
        _check_past(given, given.past, order, config, xp)
    tokens, mask = (xp.take_along_axis(x, order, axis=1) for x in (tokens, mask))
    known = xp.zeros_like(mask) if embeds_only else mask
    counted = 0 if embeds_only else tokens.shape[1]
    if options.guidance_scale not in (None, 1):
        guides = _guides(given, tokens, options, config, xp)
        columns = max(tokens.shape[1], guides[0].shape[1])
        tokens, mask = (
            xp.concatenate([_widened(x, columns, xp) for x in pair])
            for pair in zip((tokens, mask), guides, strict=True)
        )
        known = _widened(known, columns, xp)
        is_padded, longest = True, columns if xp is not np else int(mask.sum(axis=1).max())
    elif given.negative_ids is not None or given.negative_mask is not None:
        raise InputError("negative_prompt_ids needs a guidance_scale other than 1.")
    columns = tokens.shape[1]
    offset = columns - counted
    lengths = PromptLengths(columns, counted, longest, given.past_length, is_padded)
    return Prompts(ids, tokens, mask, known, order, offset, lengths)


def bucketed(plan: DecodePlan[S], prompts: Prompts, xp: Any = np) -> tuple[DecodePlan[S], Prompts]:
    """Plan and prompts with lengths rounded up: pads before the prompts, and room behind them."""
    wide = plan.bucketed()
    pads = wide.prompt_length - plan.prompt_length
    before = ((0, 0), (pads, 0))
    padded = {name: xp.pad(getattr(prompts, name), before) for name in ("tokens", "mask", "known")}
    return wide, replace(prompts, **padded, offset=prompts.offset + pads)


def infers_mask(options: GenerationConfig) -> bool:
    """Whether pads can be told from tokens: there is a pad id, and it does not end sequences."""
    return options.pad_token_id is not None and options.pad_token_id not in options.eos_token_ids


def start_of_text(options: GenerationConfig) -> list[list[int]]:
    """The prompt of who gives none: the beginning-of-sequence token.

    Raises:
        InputError: there is none.
    """
    if options.bos_token_id is None:
        raise InputError("Give input_ids: there is no bos_token_id to start from.")
    return [[options.bos_token_id]]


def check_prompt_shape(shape: Shape, dtype: str) -> None:
    """Raises InputError unless the prompts are a batch of whole numbers, neither side empty."""
    if len(shape) != 2 or 0 in shape:
        raise InputError(
            f"input_ids: expected [batch, tokens], neither of them 0, found {tuple(shape)}."
        )
    if "int" not in dtype:
        raise InputError(f"input_ids: expected whole numbers, found {dtype}.")


def check_mask_shape(shape: Shape, expected: Shape) -> None:
    """Raises InputError unless the mask has the shape of the prompts."""
    if tuple(shape) != tuple(expected):
        raise InputError(
            f"attention_mask: expected the shape of input_ids, {tuple(expected)}, found {tuple(shape)}."
        )


def check_prompts(input_ids: np.ndarray, attention_mask: np.ndarray, config: OPTConfig) -> None:
    """Checks the values of prompts [B, T] and of their mask.

    Raises:
        InputError: a mask with other values than 0 and 1, a row without a single real token, ids
            outside the vocabulary.
    """
    if not np.isin(attention_mask, (0, 1)).all():
        raise InputError("attention_mask: expected 1 at real tokens and 0 at pads, nothing else.")
    empty = np.flatnonzero(~attention_mask.any(axis=1))
    if len(empty):
        raise InputError(
            f"Row {empty[0]} of the prompts is all padding: there is nothing to continue. "
            "Give it at least one token, such as the bos_token."
        )
    check_ids(int(input_ids.min()), int(input_ids.max()), config.vocab_size)


def check_seed(seed: object, noise: object, do_sample: bool = True) -> int | None:
    """The seed as a number of Python; warns where nothing is sampled.

    Raises:
        InputError: not decided once, or by a seed that not every framework takes.
    """
    if not do_sample and not (seed is None and noise is None):
        name = "noise" if seed is None else "seed"
        warnings.warn(f"{name} has no effect without do_sample=True.", stacklevel=4)
    if seed is not None and noise is not None:
        raise InputError("Give seed or noise, not both: each of them decides the sampling.")
    if seed is None:
        return None
    is_whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not is_whole or not 0 <= int(seed) < 2**32:  # type: ignore[call-overload]
        raise InputError(f"seed: expected a whole number from 0 to 2**32 - 1, found {seed!r}.")
    return int(seed)  # type: ignore[call-overload,no-any-return]


def check_noise(shape: Shape, expected: tuple[int, int, int]) -> None:
    """Raises InputError unless the noise is [steps, rows, V]; more steps than needed may be given."""
    if tuple(shape[1:]) != expected[1:] or (shape[0] or 0) < expected[0]:
        raise InputError(f"noise: expected {expected}, found {tuple(shape)}.")


def _check_embeds(shape: Shape, config: OPTConfig) -> None:
    if len(shape) != 3 or 0 in shape or shape[2] != config.word_embed_proj_dim:
        raise InputError(
            "inputs_embeds: expected [batch, tokens, word_embed_proj_dim="
            f"{config.word_embed_proj_dim}], found {tuple(shape)}."
        )


def _check_with_embeds(shape: Shape, given: GivenPrompts) -> None:
    if given.embeds_shape is not None and tuple(given.embeds_shape[:2]) != tuple(shape):
        raise InputError(
            f"inputs_embeds and input_ids must be as many: found {tuple(given.embeds_shape)} and "
            f"{tuple(shape)}. Give the embeddings alone, or the ids that they stand for."
        )


def _read(name: str, value: Any, xp: Any) -> Any:
    """The value as an array."""
    try:
        return xp.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name}: expected [batch, tokens], found rows that make no array ({error}). Pad them to "
            "the same length: tokenizer(texts, padding=True)."
        ) from error


def _check_past(
    given: GivenPrompts, past: PastShapes, order: Any, config: OPTConfig, xp: Any
) -> None:
    rows, columns = order.shape
    check_past(config, past, rows)
    if past.used is None:
        raise InputError(
            "past_key_values: how many tokens it holds must be known where generate is traced. Give "
            "pairs of keys and values, whose shapes say it."
        )
    if given.embeds_shape is not None:
        raise InputError("past_key_values and inputs_embeds cannot be given together.")
    if past.used >= columns:
        raise InputError(
            f"past_key_values holds {past.used} tokens, and input_ids only {columns}: give "
            "all tokens, those in the cache and at least one that is not."
        )
    if past.used and xp is np and (order != np.arange(columns)).any():
        raise InputError(
            "Prompts that continue past_key_values must be padded on the left: the cache cannot move."
        )


def _guides(
    given: GivenPrompts, tokens: Any, options: GenerationConfig, config: OPTConfig, xp: Any
) -> tuple[Any, Any]:
    """Tokens and mask [B, any] of rows without the prompts: their last token, or negative prompts."""
    if given.embeds_shape is not None or given.past_length:
        raise InputError("guidance_scale needs input_ids alone: no embeddings, no past_key_values.")
    if given.negative_ids is None and given.negative_mask is not None:
        raise InputError(
            "negative_prompt_attention_mask is a mask of negative_prompt_ids: give both."
        )
    if given.negative_ids is None:
        is_last = xp.arange(tokens.shape[1]) == tokens.shape[1] - 1
        return tokens, xp.broadcast_to(is_last, tokens.shape).astype(np.int32)
    negative = GivenPrompts(given.negative_ids, given.negative_mask)
    try:
        found = read_prompts(negative, options.replace(guidance_scale=None), config, xp)
    except InputError as error:
        raise InputError(f"negative_prompt_ids, which are read as prompts: {error}") from error
    if found.tokens.shape[0] != tokens.shape[0]:
        raise InputError(
            f"negative_prompt_ids: expected {tokens.shape[0]} rows, as many as input_ids has, found "
            f"{found.tokens.shape[0]}."
        )
    return found.tokens, found.mask


def _widened(x: Any, columns: int, xp: Any) -> Any:
    """[B, any] with pads before, up to so many columns."""
    return xp.pad(x, ((0, 0), (columns - x.shape[1], 0)))
