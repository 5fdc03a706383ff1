# SPDX-License-Identifier: Apache-2.0
"""Another number of tokens for a model: the one decision of `resize_token_embeddings`."""

from __future__ import annotations

from opt_core.config import OPTConfig
from opt_core.errors import InputError


def resized_vocab_size(
    config: OPTConfig, new_num_tokens: int | None, pad_to_multiple_of: int | None
) -> int:
    """The number of rows that the word embeddings get.

    Args:
        new_num_tokens: asked for; None keeps the number, or rounds it up.
        pad_to_multiple_of: of which the number is to be a multiple, rounded up.

    Raises:
        InputError: no positive whole numbers, or a special token would lose its row.
    """
    for name, value in (
        ("new_num_tokens", new_num_tokens),
        ("pad_to_multiple_of", pad_to_multiple_of),
    ):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}: expected a whole number from 1 on, found {value!r}.")
    size = config.vocab_size if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
    special = {
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": max(config.eos_token_ids, default=None),
    }
    for name, token in special.items():
        if token is not None and token >= size:
            raise InputError(
                f"{size} tokens are too few: {name} is {token}. Change the configuration first."
            )
    return size
