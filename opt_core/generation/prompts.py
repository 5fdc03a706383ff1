# SPDX-License-Identifier: Apache-2.0
"""What holds for prompts in all three backends."""

from __future__ import annotations

import numpy as np

from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.generation.config import GenerationConfig
from opt_core.inputs import Shape, check_ids


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


def check_seed(seed: int | None, noise: object) -> None:
    """Raises InputError unless sampling is decided once, by a seed that every framework takes."""
    if seed is not None and noise is not None:
        raise InputError("Give seed or noise, not both: each of them decides the sampling.")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**32):
        raise InputError(f"seed: expected a whole number from 0 to 2**32 - 1, found {seed!r}.")


def check_noise(shape: Shape, expected: tuple[int, int, int]) -> None:
    """Raises InputError unless the noise is [steps, rows, V]; more steps than needed may be given."""
    if tuple(shape[1:]) != expected[1:] or (shape[0] or 0) < expected[0]:
        raise InputError(f"noise: expected {expected}, found {tuple(shape)}.")


def check_prompts(input_ids: np.ndarray, attention_mask: np.ndarray, config: OPTConfig) -> None:
    """Checks the values of prompts [B, T] and of their mask.

    Raises:
        InputError: a mask of another shape or with other values than 0 and 1, a row without a single
            real token, ids outside the vocabulary.
    """
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask: expected the shape of input_ids, {input_ids.shape}, found "
            f"{attention_mask.shape}."
        )
    if not np.isin(attention_mask, (0, 1)).all():
        raise InputError("attention_mask: expected 1 at real tokens and 0 at pads, nothing else.")
    empty = np.flatnonzero(~attention_mask.any(axis=1))
    if len(empty):
        raise InputError(
            f"Row {empty[0]} of the prompts is all padding: there is nothing to continue. "
            "Give it at least one token, such as the bos_token."
        )
    check_ids(int(input_ids.min()), int(input_ids.max()), config.vocab_size)
