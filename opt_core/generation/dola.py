# SPDX-License-Identifier: Apache-2.0
"""DoLa (arXiv:2309.03883): which early layers the last one is compared with."""

from __future__ import annotations

from opt_core.config import OPTConfig
from opt_core.errors import InputError

#: Tokens below this part of the highest probability are never taken.
RELATIVE_TOP = 0.1
#: In deeper models, "low" and "high" mean the first and last 20 layers instead of the halves.
DEEP, ENDS = 40, 20


def early_layers(wanted: str | tuple[int, ...], config: OPTConfig) -> tuple[int, ...]:
    """The hidden states to compare with, by number: 0 is the embeddings, i what layer i hands on.

    `_dola_decoding` of transformers from 4.45 on: every second layer of a half. With a tied head the
    first ones are left out, whose most likely next token is the token itself.

    Raises:
        InputError: a layer that does not exist or is the last one, or too shallow a model.
    """
    last = config.num_hidden_layers
    if not isinstance(wanted, str):
        for layer in wanted:
            if not 0 <= layer < last:
                raise InputError(
                    f"dola_layers: {layer} is no early layer: expected numbers from 0 to {last - 1}, "
                    f"as the model has num_hidden_layers={last}."
                )
        return wanted
    middle, after = (ENDS, last - ENDS) if last > DEEP else (last // 2, last // 2)
    if wanted == "high":
        return tuple(range(after, last, 2))
    start = min(2, last - 1) if config.tie_word_embeddings else 0
    layers = tuple(range(start, middle, 2)) or (middle,)
    if start > middle:
        raise InputError(
            f'dola_layers="low": a model of {last} layers has too few of them. Use "high", or numbers '
            f"from 0 to {last - 1}."
        )
    return layers
