# SPDX-License-Identifier: Apache-2.0
"""From options to a `DecodePlan`: frozen and hashable, the static argument of a compiled loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Generic, TypeVar

from opt_core.config import OPTConfig
from opt_core.errors import InputError, UnsupportedError
from opt_core.generation import processors as p
from opt_core.generation.config import OPTIONS, OTHER_OPTIONS, GenerationConfig
from opt_core.generation.constraints import read_constraints
from opt_core.generation.dola import early_layers
from opt_core.generation.hooks import NO_HOOKS, Hooks
from opt_core.generation.numbers import NUMBER, numbers_in, with_numbers_in
from opt_core.generation.options import (
    ASSISTANT,
    BEAMS,
    CONTRASTIVE,
    LOOKUP,
    RECORDS,
    SAMPLING,
)
from opt_core.generation.ordering import plan_processors
from opt_core.generation.strategies import (
    AssistedSearch,
    ConstrainedBeamSearch,
    ContrastiveSearch,
    GenerationMode,
    Strategy,
    choose_mode,
    make_strategy,
)

#: Compiled loops are made for lengths that are multiples of this, of prompts and of new tokens.
BUCKET = 32
#: Caches of compiled loops have columns in multiples of this: of other masks, fused kernels make copies.
ALIGNED = 8
#: Below it, scores divided by the temperature would no longer be numbers of float32.
LOWEST_TEMPERATURE = 1e-30
#: Above it, in powers of ten, lengths with a length_penalty would no longer be numbers of float32.
HIGHEST_POWER = 30


@dataclass(frozen=True)
class PromptLengths:
    """What a plan must know of the prompts.

    Attributes:
        columns: of the prompts with their padding, past tokens included.
        counted: those of them that `max_length` and the like count: none of embeddings without ids.
        longest: the number of real tokens in the longest row.
        past: columns that are in a cache already.
        is_padded: whether any column of any row is padding.
    """

    columns: int
    counted: int
    longest: int
    past: int = 0
    is_padded: bool = False


S = TypeVar("S", bound=Strategy)


@dataclass(frozen=True)
class DecodePlan(Generic[S]):
    """What a loop does: it decides nothing more.

    Attributes:
        is_static: whether lengths are known at run time only.

    `capacity` is the number of cache columns that prompt and new tokens need.
    """

    strategy: S
    processors: tuple[p.LogitsProcessor, ...]
    prompt_length: int
    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = field(metadata=NUMBER)
    pad_token_id: int = field(metadata=NUMBER)
    num_return_sequences: int = 1
    past_length: int = 0
    is_padded: bool = False
    is_static: bool = False
    dola_layers: tuple[int, ...] = ()

    @property
    def capacity(self) -> int:
        fed_back = self.max_new_tokens - 1  # all but the last token
        columns = self.prompt_length + fed_back + self.strategy.spare_columns
        return _rounded_up(columns, ALIGNED) if self.is_static else columns

    @property
    def is_guided(self) -> bool:
        """Whether a second set of rows, without the prompts, runs beside the first."""
        return any(isinstance(processor, p.Guidance) for processor in self.processors)

    @property
    def layout(self) -> DecodePlan[S]:
        """The plan without what is done to the scores: of rows, columns and guides alone."""
        guides = tuple(x for x in self.processors if isinstance(x, p.Guidance))
        return replace(self, processors=guides, dola_layers=())

    @property
    def calls_back(self) -> bool:
        """Whether a processor runs code of the caller."""
        return any(isinstance(processor, p.HostProcessor) for processor in self.processors)

    @property
    def needs_host(self) -> bool:
        """Whether the loop runs code that cannot be compiled into it."""
        by_itself = isinstance(self.strategy, ConstrainedBeamSearch | AssistedSearch)
        return by_itself or self.calls_back

    @property
    def numbers(self) -> tuple[float, ...]:
        """What the `NUMBER` fields hold, the strategy's and processors' too: one loop serves all values."""
        return tuple(chain.from_iterable(map(numbers_in, (self, self.strategy, *self.processors))))

    @property
    def key(self) -> DecodePlan[S]:
        """The plan without them: what a loop is compiled for."""
        return self.with_numbers([0] * len(self.numbers))

    def with_numbers(self, numbers: Iterable[Any]) -> DecodePlan[S]:
        """The plan with others in their places, or with arrays inside a compiled loop."""
        given = iter(numbers)
        own = with_numbers_in(self, given)
        strategy = with_numbers_in(self.strategy, given)
        processors = tuple(with_numbers_in(processor, given) for processor in self.processors)
        return replace(own, strategy=strategy, processors=processors)

    def bucketed(self) -> DecodePlan[S]:
        """The plan with both lengths rounded up, so that few are compiled.

        A loop that runs it is told at run time how many columns and tokens are meant.
        """
        prompt_length = _rounded_up(self.prompt_length, BUCKET)
        pads = prompt_length - self.prompt_length
        return replace(
            self,
            prompt_length=prompt_length,
            max_new_tokens=_rounded_up(self.max_new_tokens, BUCKET),
            past_length=self.past_length and self.past_length + pads,
            is_padded=True,
            is_static=True,
        )


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def make_plan(
    options: GenerationConfig,
    config: OPTConfig,
    lengths: PromptLengths | int,
    hooks: Hooks = NO_HOOKS,
) -> DecodePlan[Strategy]:
    """Turns options into a plan for prompts of these lengths, or says why that cannot be.

    Args:
        lengths: of the prompts; a number stands for prompts without padding.

    Raises:
        InputError: options that contradict each other, the prompts or the model.
        UnsupportedError: an option that OPT models cannot have.
    """
    if isinstance(lengths, int):
        lengths = PromptLengths(lengths, lengths, lengths)
    _refuse_foreign(options)
    hooks.check(options)
    mode = choose_mode(
        options,
        constrained=bool(hooks.constraints),
        assisted=hooks.assistant_model is not None,
    )
    constraints = read_constraints(hooks.constraints, options.force_words_ids, config.vocab_size)
    strategy = make_strategy(mode, options, constraints)
    _check_contrastive(strategy, config, lengths)
    max_new_tokens = _max_new_tokens(options, config, lengths, strategy)
    _check_ids(options, config)
    _check_consistency(options, lengths.counted + max_new_tokens, max_new_tokens)
    _check_beams(options, config, max_new_tokens)
    _warn_of_unused(options, mode)
    return DecodePlan(
        strategy=strategy,
        processors=tuple(plan_processors(options, config, lengths.counted, hooks)),
        prompt_length=lengths.columns,
        max_new_tokens=max_new_tokens,
        eos_token_ids=options.eos_token_ids,
        pad_token_id=_pad_token_id(options),
        num_return_sequences=options.num_return_sequences,
        past_length=lengths.past,
        is_padded=lengths.is_padded,
        dola_layers=_dola_layers(options, config),
    )


def _refuse_foreign(options: GenerationConfig) -> None:
    for name, neutral in OTHER_OPTIONS.items():
        value = options.extra.get(name)
        if value not in (None, neutral) and neutral is not None:
            raise UnsupportedError(
                f"generate: {name}={value!r} is for models with an encoder, which OPT does not have."
            )


def _check_contrastive(strategy: Strategy, config: OPTConfig, lengths: PromptLengths) -> None:
    if not isinstance(strategy, ContrastiveSearch):
        return
    if lengths.past:
        raise InputError(
            "Contrastive search compares hidden states, which past_key_values does not hold: leave it "
            "out, and give all tokens."
        )
    if strategy.top_k > config.vocab_size:
        raise InputError(
            f"top_k={strategy.top_k}: contrastive search cannot run more candidates than the "
            f"vocabulary of {config.vocab_size} tokens has."
        )


def _max_new_tokens(
    options: GenerationConfig, config: OPTConfig, lengths: PromptLengths, strategy: Strategy
) -> int:
    count = options.max_new_tokens
    if count is None:
        count = options.max_length - lengths.counted
    if count < 1:
        raise InputError(
            f"The prompt has {lengths.counted} tokens, but max_length={options.max_length} counts "
            "prompt and new tokens together: nothing is left to generate. Set max_new_tokens."
        )
    total = lengths.longest + count - 1  # the last new token is not fed back
    if isinstance(strategy, ContrastiveSearch):
        total += 1  # but the candidates for it are run
    if total > config.max_position_embeddings:
        raise InputError(
            f"A prompt of {lengths.longest} tokens and {count} new ones need {total} positions, but "
            f"the position table has {config.max_position_embeddings} (max_position_embeddings). "
            "Shorten the prompt or lower max_new_tokens."
        )
    return count


def _check_ids(options: GenerationConfig, config: OPTConfig) -> None:
    for name, row in OPTIONS.items():
        for token in row.ids(getattr(options, name)):
            if not 0 <= token < config.vocab_size:
                raise InputError(
                    f"{name}={token} lies outside the vocabulary of {config.vocab_size} tokens."
                )


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
    if options.diversity_penalty and options.num_beams > 1 and options.num_beam_groups == 1:
        raise InputError(
            f"diversity_penalty={options.diversity_penalty} acts between groups of beams: set "
            "num_beam_groups above 1."
        )
    if options.exponential_decay_length_penalty is not None and not options.eos_token_ids:
        raise InputError("exponential_decay_length_penalty needs an eos_token_id to make likelier.")


def _check_beams(options: GenerationConfig, config: OPTConfig, max_new_tokens: int) -> None:
    if options.num_beams == 1:
        return
    if abs(options.length_penalty) * math.log10(max_new_tokens) > HIGHEST_POWER:
        raise InputError(
            f"length_penalty={options.length_penalty}: scores divided by {max_new_tokens} ** "
            "length_penalty are no numbers of float32 any more. Choose it closer to 0."
        )
    if len(options.eos_token_ids) >= config.vocab_size:
        raise InputError(
            f"eos_token_id holds all {config.vocab_size} tokens: no beam can go on. Leave out one."
        )


def _warn_of_unused(options: GenerationConfig, mode: GenerationMode) -> None:
    serves = {
        SAMPLING: options.do_sample,
        BEAMS: options.num_beams > 1,
        CONTRASTIVE: mode is GenerationMode.CONTRASTIVE,
        ASSISTANT: mode is GenerationMode.ASSISTED,
        LOOKUP: mode is GenerationMode.PROMPT_LOOKUP,
        RECORDS: options.return_dict_in_generate,
    }
    for name, row in OPTIONS.items():
        value = getattr(options, name)
        if row.purpose is None or serves[row.purpose] or value in (None, row.default):
            continue
        if name == "top_k" and serves[CONTRASTIVE]:
            continue
        warnings.warn(f"{name}={value} has no effect without {row.purpose}.", stacklevel=4)


def _pad_token_id(options: GenerationConfig) -> int:
    if options.pad_token_id is not None:
        return options.pad_token_id
    if not options.eos_token_ids:
        return 0  # no row ever ends early, so nothing is ever padded
    warnings.warn(
        f"pad_token_id is not set: rows that end early are filled with {options.eos_token_ids[0]}, "
        "the end-of-sequence id.",
        stacklevel=4,
    )
    return options.eos_token_ids[0]


def _dola_layers(options: GenerationConfig, config: OPTConfig) -> tuple[int, ...]:
    """The layers that DoLa compares the last one with; none where it is not asked for."""
    if options.dola_layers is None:
        return ()
    if options.guidance_scale not in (None, 1):
        raise InputError("dola_layers and guidance_scale both change the logits: leave out one.")
    return early_layers(options.dola_layers, config)
