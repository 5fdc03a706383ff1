# SPDX-License-Identifier: Apache-2.0
"""Which processors the options ask for, in the order in which they are applied.

The order is the reference's (`generation/utils.py:_get_logits_processor`, `_get_logits_warper`).
"""

from __future__ import annotations

from collections.abc import Iterator

from opt_core.config import OPTConfig
from opt_core.generation import processors as p
from opt_core.generation.config import GenerationConfig
from opt_core.generation.hooks import Hooks


def plan_processors(
    options: GenerationConfig, config: OPTConfig, prompt_length: int, hooks: Hooks
) -> Iterator[p.LogitsProcessor]:
    """All processors for prompts of `prompt_length` columns."""
    yield from _of_content(options)
    yield from _of_ends(options, prompt_length)
    yield from _of_positions(options, prompt_length, hooks)
    for function in hooks.logits_processor:
        yield p.UserDefined(function)
    if options.renormalize_logits:
        yield p.Renormalize()
    if options.do_sample:
        yield from _of_sampling(options, config)


def _of_content(options: GenerationConfig) -> Iterator[p.LogitsProcessor]:
    """Those that look at which tokens stand where."""
    eos = options.eos_token_ids
    if options.guidance_scale not in (None, 1):
        yield p.Guidance(float(options.guidance_scale))
    if options.sequence_bias:
        biases = {ids: float(bias) for ids, bias in options.sequence_bias}
        yield p.SequenceBias(tuple(biases.items()))
    if options.diversity_penalty and options.num_beam_groups > 1:
        yield p.Diversity(float(options.diversity_penalty))
    if options.encoder_repetition_penalty != 1.0:
        yield p.PromptRepetitionPenalty(float(options.encoder_repetition_penalty))
    if options.repetition_penalty != 1.0:
        yield p.RepetitionPenalty(float(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        yield p.NoRepeatNGram(options.no_repeat_ngram_size)
    words = [w for w in options.bad_words_ids or () if not (len(w) == 1 and w[0] in eos)]
    if words:
        yield p.SequenceBias(tuple(dict.fromkeys(words, float("-inf")).items()))


def _of_ends(options: GenerationConfig, prompt_length: int) -> Iterator[p.LogitsProcessor]:
    """Those that put off the end."""
    eos = options.eos_token_ids
    if eos and options.min_length > prompt_length:
        yield p.MinLength(options.min_length, eos)
    if eos and options.min_new_tokens:
        yield p.MinNewTokens(options.min_new_tokens, eos)


def _of_positions(
    options: GenerationConfig, prompt_length: int, hooks: Hooks
) -> Iterator[p.LogitsProcessor]:
    """Those that look at how far a row has come, and the caller's choice of tokens among them."""
    if hooks.prefix_allowed_tokens_fn is not None:
        beams = options.num_beams // options.num_beam_groups
        yield p.PrefixAllowed(hooks.prefix_allowed_tokens_fn, beams)
    if options.forced_bos_token_id is not None:
        yield p.ForcedBOS(options.forced_bos_token_id)
    if options.forced_eos_token_id is not None:
        forced = options.forced_eos_token_id
        yield p.ForcedEOS(forced if isinstance(forced, tuple) else (forced,))
    if options.remove_invalid_values:
        yield p.RemoveInvalid()
    if options.exponential_decay_length_penalty is not None:
        start, factor = options.exponential_decay_length_penalty
        yield p.LengthDecay(start, float(factor), options.eos_token_ids)
    if options.suppress_tokens:
        yield p.Suppress(options.suppress_tokens)
    if options.begin_suppress_tokens:
        waits = prompt_length <= 1 and options.forced_bos_token_id is not None
        step = int(waits)
        if options.forced_decoder_ids:
            step += options.forced_decoder_ids[-1][0]
        yield p.SuppressAtBegin(options.begin_suppress_tokens, step)
    if options.forced_decoder_ids:
        yield p.ForceTokens(options.forced_decoder_ids)


def _of_sampling(options: GenerationConfig, config: OPTConfig) -> Iterator[p.LogitsProcessor]:
    """Those that say which tokens are drawn from."""
    # Beams need a token besides the ends to go on with.
    keep = max(1, len(options.eos_token_ids)) + 1 if options.num_beams > 1 else 1
    if options.temperature != 1.0:
        yield p.Temperature(float(options.temperature))
    if options.top_k:
        yield p.TopK(min(max(options.top_k, keep), config.vocab_size))
    if options.top_p is not None and options.top_p < 1.0:
        yield p.TopP(float(options.top_p), keep)
    if options.min_p:
        yield p.MinP(float(options.min_p), keep)
    if options.typical_p is not None and options.typical_p < 1.0:
        yield p.Typical(float(options.typical_p), keep)
    if 0.0 < options.epsilon_cutoff < 1.0:
        yield p.Epsilon(float(options.epsilon_cutoff), keep)
    if 0.0 < options.eta_cutoff < 1.0:
        yield p.Eta(float(options.eta_cutoff), keep)
    if options.renormalize_logits:
        yield p.Renormalize()
