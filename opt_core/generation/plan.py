# SPDX-License-Identifier: Apache-2.0
"""From options to a `DecodePlan`: frozen and hashable, the static argument of a compiled loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from opt_core.config import OPTConfig
from opt_core.errors import InputError, UnsupportedError
from opt_core.generation.config import BEAM_OPTIONS, UNSUPPORTED, GenerationConfig
from opt_core.generation.processors import (
    LogitsProcessor,
    MinLength,
    MinNewTokens,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
)

#: Below it, scores divided by the temperature would no longer be numbers of float32.
LOWEST_TEMPERATURE = 1e-30


class GenerationMode(Enum):
    GREEDY = "greedy"
    SAMPLE = "sample"


@dataclass(frozen=True)
class DecodePlan:
    """What a loop does: it decides nothing more.

    `capacity` is the number of cache columns that prompt and new tokens need.
    """

    mode: GenerationMode
    processors: tuple[LogitsProcessor, ...]
    prompt_length: int
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    num_return_sequences: int

    @property
    def capacity(self) -> int:
        return self.prompt_length + self.max_new_tokens - 1  # the last token is never fed back


def make_plan(options: GenerationConfig, config: OPTConfig, prompt_length: int) -> DecodePlan:
    """Turns options into a plan for prompts of `prompt_length` columns, or says why that cannot be.

    Raises:
        InputError: options that contradict each other, the prompt or the model.
        UnsupportedError: an option that this release does not have.
    """
    beams = options.extra.get("num_beams", 1)
    for name, neutral in UNSUPPORTED.items():
        value = options.extra.get(name, neutral)
        if name in BEAM_OPTIONS and beams in (None, 1):
            continue  # without beams they say nothing
        if value is not None and value != neutral and value != []:
            raise UnsupportedError(
                f"generate: {name}={options.extra[name]!r} is not supported in this release. "
                "Supported: greedy decoding and sampling with temperature, top_k, top_p, "
                "repetition_penalty, min_length, min_new_tokens."
            )
    max_new_tokens = _max_new_tokens(options, config, prompt_length)
    eos = options.eos_token_ids
    for token in eos:
        if not 0 <= token < config.vocab_size:
            raise InputError(
                f"eos_token_id={token} lies outside the vocabulary of {config.vocab_size} tokens."
            )
    _check_consistency(options, prompt_length + max_new_tokens, max_new_tokens)
    if options.num_return_sequences > 1 and not options.do_sample:
        raise InputError(
            f"num_return_sequences={options.num_return_sequences} needs do_sample=True: greedy "
            "decoding gives the same sequence each time."
        )
    return DecodePlan(
        mode=GenerationMode.SAMPLE if options.do_sample else GenerationMode.GREEDY,
        processors=tuple(_processors(options, config, prompt_length)),
        prompt_length=prompt_length,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos,
        pad_token_id=_pad_token_id(options, config.vocab_size),
        num_return_sequences=options.num_return_sequences,
    )


def _max_new_tokens(options: GenerationConfig, config: OPTConfig, prompt_length: int) -> int:
    count = options.max_new_tokens
    if count is None:
        count = options.max_length - prompt_length
    if count < 1:
        raise InputError(
            f"The prompt has {prompt_length} tokens, but max_length={options.max_length} counts "
            "prompt and new tokens together: nothing is left to generate. Set max_new_tokens."
        )
    total = prompt_length + count - 1  # the last new token is not fed back
    if total > config.max_position_embeddings:
        raise InputError(
            f"A prompt of {prompt_length} tokens and {count} new ones need {total} positions, but "
            f"the position table has {config.max_position_embeddings} (max_position_embeddings). "
            "Shorten the prompt or lower max_new_tokens."
        )
    return count


def _check_consistency(options: GenerationConfig, length: int, max_new_tokens: int) -> None:
    if options.min_length > length:
        raise InputError(
            f"min_length={options.min_length} cannot be reached: prompt and new tokens together end "
            f"at {length}. Lower it, or raise max_new_tokens."
        )
    if (options.min_new_tokens or 0) > max_new_tokens:
        raise InputError(
            f"min_new_tokens={options.min_new_tokens} is more than the {max_new_tokens} tokens that "
            "max_new_tokens or max_length leave. Lower it, or raise max_new_tokens."
        )
    if options.do_sample and options.temperature < LOWEST_TEMPERATURE:
        raise InputError(
            f"temperature={options.temperature}: sampling needs at least {LOWEST_TEMPERATURE}. "
            "For the most likely tokens, use do_sample=False."
        )
    if not options.do_sample:
        defaults = GenerationConfig()
        for name in ("temperature", "top_k", "top_p"):
            value = getattr(options, name)
            if value is not None and value != getattr(defaults, name):
                warnings.warn(f"{name}={value} has no effect without do_sample=True.", stacklevel=5)


def _pad_token_id(options: GenerationConfig, vocab_size: int) -> int:
    if options.pad_token_id is not None:
        if not 0 <= options.pad_token_id < vocab_size:
            raise InputError(
                f"pad_token_id={options.pad_token_id} lies outside the vocabulary of {vocab_size} "
                "tokens."
            )
        return options.pad_token_id
    if not options.eos_token_ids:
        return 0  # no row ever ends early, so nothing is ever padded
    warnings.warn(
        f"pad_token_id is not set: rows that end early are filled with {options.eos_token_ids[0]}, "
        "the end-of-sequence id.",
        stacklevel=4,
    )
    return options.eos_token_ids[0]


def _processors(
    options: GenerationConfig, config: OPTConfig, prompt_length: int
) -> Iterator[LogitsProcessor]:
    """In the reference's order (`generation/utils.py:_get_logits_processor`, `_get_logits_warper`)."""
    eos = options.eos_token_ids
    if options.repetition_penalty != 1.0:
        yield RepetitionPenalty(float(options.repetition_penalty))
    if eos and options.min_length > prompt_length:
        yield MinLength(options.min_length, eos)
    if eos and options.min_new_tokens:
        yield MinNewTokens(options.min_new_tokens, eos)
    if not options.do_sample:
        return
    if options.temperature != 1.0:
        yield Temperature(float(options.temperature))
    if options.top_k:
        yield TopK(min(options.top_k, config.vocab_size))
    if options.top_p is not None and options.top_p < 1.0:
        yield TopP(float(options.top_p))
