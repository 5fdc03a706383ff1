# SPDX-License-Identifier: Apache-2.0
"""The strategies as data: how the scores of the next tokens become sequences.

Each backend's `generation/` says how, one loop for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import ClassVar

from opt_core.errors import InputError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.constraints import Constraint
from opt_core.generation.numbers import NUMBER

#: Proposals are filled up to a multiple of this, where each number of them would be compiled.
PROPOSALS = 8


class GenerationMode(Enum):
    """The reference's names of what a caller asks for; several of them may share a strategy."""

    GREEDY = "greedy"
    SAMPLE = "sample"
    BEAM = "beam"
    BEAM_SAMPLE = "beam-sample"
    GROUP_BEAM = "group-beam"
    CONSTRAINED_BEAM = "constrained-beam"
    CONTRASTIVE = "contrastive"
    ASSISTED = "assisted"
    PROMPT_LOOKUP = "prompt-lookup"
    DOLA = "dola"


@dataclass(frozen=True)
class Strategy:
    """How the scores of the next tokens become sequences.

    Attributes:
        rows: decoded side by side for each prompt.
        do_sample: whether noise is added to the scores before the highest is taken.
        spare_columns: of the cache, beyond those of prompt and new tokens without the last.
    """

    rows: int = 1
    do_sample: bool = False
    spare_columns: ClassVar[int] = 0


@dataclass(frozen=True)
class Search(Strategy):
    """One token after the other, each row for itself: greedy decoding and sampling."""


@dataclass(frozen=True)
class BeamSearch(Strategy):
    """Keeps the best `rows` beginnings of each prompt, in groups that avoid each other's tokens.

    A finished sequence scores the sum of its log-probabilities / new tokens ** `length_penalty`
    (arXiv:1609.08144, and arXiv:1610.02424 for the groups).
    """

    num_groups: int = 1
    length_penalty: float = field(default=1.0, metadata=NUMBER)
    early_stopping: bool | str = False


@dataclass(frozen=True)
class ConstrainedBeamSearch(BeamSearch):
    """Beam search whose sequences fulfil constraints, which the host keeps account of.

    arXiv:1804.06609.
    """

    constraints: tuple[Constraint, ...] = ()


@dataclass(frozen=True)
class ContrastiveSearch(Strategy):
    """Takes among the `top_k` likeliest tokens the one most unlike what stands before it.

    The score is `(1 - penalty_alpha) * probability - penalty_alpha * highest cosine similarity` of
    hidden states (arXiv:2202.06417). With `low_memory`, the candidates are run one after the other.
    """

    top_k: int = 4
    penalty_alpha: float = field(default=0.6, metadata=NUMBER)
    low_memory: bool = False
    spare_columns: ClassVar[int] = 1  # candidates for the last token are run too


@dataclass(frozen=True)
class AssistedSearch(Strategy):
    """Checks several proposed tokens in one call; the tokens are those of `Search`, with its noise.

    arXiv:2211.17192, with proposals accepted as long as they equal what the model itself would take.

    Attributes:
        num_tokens: proposed at a time, in the beginning.
        constant: whether it stays so; else 2 more if all were accepted, and 1 fewer if not.
        lookup_size: the longest n-gram to look up in the row instead of asking an assistant; or None.
    """

    num_tokens: int = 5
    constant: bool = False
    lookup_size: int | None = None
    spare_columns: ClassVar[int] = PROPOSALS - 1  # for what proposals are filled up with

    def next_count(self, count: int, accepted: int) -> int:
        """How many tokens to propose after `count` of which so many were accepted."""
        if self.constant:
            return count
        return count + 2 if accepted == count else max(1, count - 1)


STRATEGIES = (Search, BeamSearch, ConstrainedBeamSearch, ContrastiveSearch, AssistedSearch)

#: Of each n-gram size up to this, the reference's prompt lookup looks for a match.
DEFAULT_LOOKUP_SIZE = 2


def choose_mode(options: GenerationConfig, *, constrained: bool, assisted: bool) -> GenerationMode:
    """What the options ask for (`generation/utils.py:_get_generation_mode` of the reference).

    Args:
        constrained: whether constraints were given beside the options.
        assisted: whether an assistant was given.

    Raises:
        InputError: options that ask for two things at once.
    """
    beams = options.num_beams > 1
    asked = {
        GenerationMode.CONSTRAINED_BEAM: constrained or options.force_words_ids is not None,
        GenerationMode.GROUP_BEAM: beams and options.num_beam_groups > 1,
        GenerationMode.CONTRASTIVE: bool(
            options.penalty_alpha and (options.top_k or 0) > 1 and not beams
        )
        and not options.do_sample,
        GenerationMode.ASSISTED: assisted,
        GenerationMode.PROMPT_LOOKUP: options.prompt_lookup_num_tokens is not None,
        GenerationMode.DOLA: options.dola_layers is not None,
    }
    found = [mode for mode, is_asked in asked.items() if is_asked]
    if len(found) > 1:
        raise InputError(
            f"The options ask for {found[0].value} and for {found[1].value} decoding at once: "
            "leave out those of one of them."
        )
    if not found:
        plain = {
            (False, False): GenerationMode.GREEDY,
            (False, True): GenerationMode.SAMPLE,
            (True, False): GenerationMode.BEAM,
            (True, True): GenerationMode.BEAM_SAMPLE,
        }
        return plain[beams, options.do_sample]
    (mode,) = found
    _check_mode(mode, options)
    return mode


def _check_mode(mode: GenerationMode, options: GenerationConfig) -> None:
    constrained = mode is GenerationMode.CONSTRAINED_BEAM
    with_beams = constrained or mode is GenerationMode.GROUP_BEAM
    if constrained and options.num_beams == 1:
        raise InputError("Constraints and force_words_ids need num_beams above 1.")
    if with_beams and options.do_sample:
        raise InputError(f"{mode.value} search cannot sample: use do_sample=False.")
    if not with_beams and options.num_beams > 1:
        raise InputError(f"{mode.value} decoding has no beams: use num_beams=1.")
    if mode is GenerationMode.GROUP_BEAM:
        if options.num_beams % options.num_beam_groups:
            raise InputError(
                f"num_beams={options.num_beams} cannot be divided into "
                f"num_beam_groups={options.num_beam_groups} groups of the same size."
            )
        if not options.diversity_penalty:
            raise InputError(
                "num_beam_groups needs a diversity_penalty above 0: else all groups are the same."
            )


def make_strategy(
    mode: GenerationMode, options: GenerationConfig, constraints: tuple[Constraint, ...] = ()
) -> Strategy:
    """The strategy for a mode, its options, and the constraints where the mode is about them.

    Raises:
        InputError: more sequences asked for than the strategy finds.
    """
    beams, sample, wanted = options.num_beams, options.do_sample, options.num_return_sequences
    if mode in (GenerationMode.SAMPLE, GenerationMode.GREEDY, GenerationMode.DOLA) and sample:
        return Search(rows=wanted, do_sample=True)
    if wanted > beams:
        raise InputError(
            f"num_return_sequences={wanted} needs do_sample=True or as many beams: {mode.value} "
            f"decoding with num_beams={beams} finds {beams}."
        )
    if mode in (GenerationMode.GREEDY, GenerationMode.DOLA):
        return Search()
    if mode is GenerationMode.CONTRASTIVE:
        return ContrastiveSearch(
            top_k=options.top_k or 0,
            penalty_alpha=options.penalty_alpha or 0.0,
            low_memory=bool(options.low_memory),
        )
    if mode in (GenerationMode.ASSISTED, GenerationMode.PROMPT_LOOKUP):
        lookup = options.prompt_lookup_num_tokens
        return AssistedSearch(
            do_sample=sample,
            num_tokens=lookup or options.num_assistant_tokens,
            constant=lookup is not None or options.num_assistant_tokens_schedule == "constant",
            lookup_size=lookup and (options.max_matching_ngram_size or DEFAULT_LOOKUP_SIZE),
        )
    early = options.early_stopping
    if early == "never" and options.length_penalty <= 0.0:
        early = False  # the same: no longer sequence can have a better score
    search: Callable[..., BeamSearch] = BeamSearch
    if mode is GenerationMode.CONSTRAINED_BEAM:
        search = partial(ConstrainedBeamSearch, constraints=constraints)
    return search(
        rows=beams,
        do_sample=sample,
        num_groups=options.num_beam_groups,
        length_penalty=float(options.length_penalty),
        early_stopping=early,
    )
