# SPDX-License-Identifier: Apache-2.0
"""The command `opt-zoo generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from opt_core.assets import TINY_SUMS
from opt_core.errors import InputError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.prompts import check_seed
from opt_core.generation.strategies import GenerationMode, choose_mode
from opt_core.generation.streaming import TextStreamer
from opt_zoo import options, processes, render
from opt_zoo.backends import BACKENDS
from opt_zoo.processes import Reply
from opt_zoo.prompts import Prompts
from opt_zoo.strategies import OPTIONS, parse_options
from opt_zoo.terminal import err, worker_progress
from opt_zoo.worker import Request


def generate(
    framework: options.OneFramework,
    model: options.Model = str(TINY_SUMS),
    prompt: options.Prompt = None,
    max_new_tokens: options.MaxNewTokens = 32,
    min_new_tokens: options.MinNewTokens = None,
    strategy: options.Strategy = None,
    do_sample: options.DoSample = False,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    num_return_sequences: options.NumReturnSequences = None,
    option: options.Option = None,
    force_word: options.ForceWord = None,
    stop: options.Stop = None,
    assistant: options.Assistant = None,
    seed: options.Seed = None,
    dtype: options.Dtype = None,
    stream: options.Stream = False,
    stats: options.Stats = False,
    as_json: options.AsJson = False,
) -> None:
    """Continue prompts with one framework."""
    check_seed(seed, None)
    (name,) = options.frameworks([framework])
    prompts = Prompts.encode(model, prompt or _lines_of_stdin())
    named = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "do_sample": do_sample or None,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "num_return_sequences": num_return_sequences,
        "force_words_ids": prompts.words(force_word or ()) or None,
        "stop_strings": stop,
    }
    given = {
        **(OPTIONS[strategy] if strategy else {}),
        **{name: value for name, value in named.items() if value is not None},
        **parse_options(option or ()),
    }
    _check_strategy(strategy, given, assistant)
    if given.get("return_dict_in_generate"):
        raise InputError("return_dict_in_generate: the command prints sequences and nothing else.")
    if stream and given.get("num_return_sequences", 1) > 1:
        raise InputError("--stream prints one sequence: leave out --num-return-sequences.")
    request = Request(
        name,
        str(prompts.directory),
        prompts.inputs,
        given if seed is None else {**given, "seed": seed},
        dtype=dtype,
        assistant=assistant,
        tokenizer=str(prompts.directory) if given.get("stop_strings") else None,
        stream=stream,
        repeat=stats,
    )
    reply = _run(request, prompts)
    if not stream:
        _print_continuations(prompts, reply.sequences, as_json)
    if stats:
        err.print(render.statistics(name, reply, prompts.new_tokens(reply.sequences)))


def _check_strategy(
    strategy: GenerationMode | None, given: dict[str, Any], assistant: str | None
) -> None:
    mode = choose_mode(
        GenerationConfig().replace(**given), constrained=False, assisted=assistant is not None
    )
    if strategy not in (None, mode):
        missing = {
            GenerationMode.ASSISTED: " It needs --assistant.",
            GenerationMode.CONSTRAINED_BEAM: " It needs --force-word.",
        }
        raise InputError(
            f"--strategy {strategy.value}: the other options ask for {mode.value} decoding."
            f"{missing.get(strategy, '')}"
        )


def _run(request: Request, prompts: Prompts) -> Reply:
    """The reply; where tokens are streamed, their text is printed as they come."""
    with worker_progress(BACKENDS[request.framework].title) as show:
        if not request.stream:
            return processes.run(request, show)
        if len(prompts.texts) > 1:
            raise InputError(f"--stream prints one prompt, found {len(prompts.texts)}.")
        streamer = TextStreamer(prompts.tokenizer, skip_special_tokens=True)

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] != "tokens":
                show(event)
            elif event["tokens"] is None:
                streamer.end()
            else:
                streamer.put(event["tokens"])

        return processes.run(request, on_event)


def _lines_of_stdin() -> list[str]:
    return [line.rstrip("\r\n") for line in sys.stdin if line.strip()]


def _print_continuations(
    prompts: Prompts, sequences: Sequence[Sequence[int]], as_json: bool
) -> None:
    tokens = prompts.new_tokens(sequences)
    each = len(tokens) // len(prompts.texts)
    rows = [
        {"prompt": prompts.texts[index // each], "text": text, "tokens": row}
        for index, (text, row) in enumerate(zip(prompts.decode(tokens), tokens, strict=True))
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['prompt']}{row['text']}")
