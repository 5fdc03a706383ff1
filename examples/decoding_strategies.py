# SPDX-License-Identifier: Apache-2.0
"""Every way to decode: what it does, the options of `generate` that ask for it, and what it says.

    python examples/decoding_strategies.py --backend flax --strategy greedy --strategy beam
    python examples/decoding_strategies.py --model facebook/opt-125m --prompt "The moon is made of"

By default the embedded model adds, in PyTorch. The same options give the same tokens in all frameworks.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from opt_core import OPTTokenizer
from opt_core.assets import TINY_SUMS


@dataclass(frozen=True)
class Framework:
    """Where the model is, and what the tokenizer calls the framework's arrays."""

    package: str
    model: str
    arrays: str
    options: dict[str, Any] = field(default_factory=dict)  # of `from_pretrained`


@dataclass(frozen=True)
class Strategy:
    """What a strategy does, in a line, and the options that ask for it."""

    what: str
    options: dict[str, Any] = field(default_factory=dict)


FRAMEWORKS = {
    "torch": Framework("opt_torch", "OPTForCausalLM", "pt"),
    "tf": Framework("opt_tf", "TFOPTForCausalLM", "tf"),
    "flax": Framework("opt_flax", "FlaxOPTForCausalLM", "jax", {"param_dtype": "float32"}),
}

TWO = {"num_return_sequences": 2}

STRATEGIES = {
    "greedy": Strategy("takes the likeliest token each time"),
    "sample": Strategy(
        "draws among the likeliest tokens that have 0.8 of the probability together",
        {"do_sample": True, "top_k": 0, "top_p": 0.8, "temperature": 2.5, **TWO},
    ),
    "beam": Strategy(
        "keeps the 4 likeliest beginnings, and returns the best ends", {"num_beams": 4, **TWO}
    ),
    "beam-sample": Strategy(
        "draws how the 4 beginnings go on",
        {"num_beams": 4, "do_sample": True, **TWO},
    ),
    "group-beam": Strategy(
        "keeps 2 groups of 2 beginnings, of which the second avoids the first's tokens",
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 5.0, **TWO},
    ),
    "constrained": Strategy(
        "keeps beginnings that lead to a text with the words of --force-word", {"num_beams": 4}
    ),
    "contrastive": Strategy(
        "takes among 4 likely tokens the one most unlike what stands before it",
        {"penalty_alpha": 0.6, "top_k": 4},
    ),
    "assisted": Strategy(
        "lets a smaller model propose tokens, and keeps those that greedy decoding takes"
    ),
    "prompt-lookup": Strategy(
        "proposes what once followed the same tokens in the text, and keeps what greedy takes",
        {"prompt_lookup_num_tokens": 4},
    ),
    "dola": Strategy(
        "takes the token that the last layer prefers most, compared with an earlier layer",
        {"dola_layers": "high"},
    ),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; without `--strategy`, all of them are shown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--backend", choices=FRAMEWORKS, default="torch")
    parser.add_argument("--model", default=str(TINY_SUMS), help="name or folder of an OPT model")
    parser.add_argument("--assistant", help="name or folder of a smaller one (default: the model)")
    parser.add_argument("--prompt", default="ninety-six plus eighty-seven is")
    parser.add_argument(
        "--force-word", default=" seven", help="as it stands in a text, space and all"
    )
    parser.add_argument("--strategy", action="append", choices=STRATEGIES, help="may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    return parser.parse_args(arguments)


def decode(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """The name of each strategy, the options of `generate`, and the texts that follow the prompt."""
    framework = FRAMEWORKS[options.backend]
    model_class = getattr(importlib.import_module(framework.package), framework.model)
    tokenizer = OPTTokenizer.from_pretrained(options.model)
    load = partial(model_class.from_pretrained, **framework.options)
    model = load(options.model)
    assistant = load(options.assistant) if options.assistant else model
    inputs = tokenizer([options.prompt], return_tensors=framework.arrays)
    for name in options.strategy or STRATEGIES:
        given = {**STRATEGIES[name].options, "max_new_tokens": options.max_new_tokens}
        if given.get("do_sample"):
            given["seed"] = options.seed
        if name == "constrained":
            word = tokenizer.encode(options.force_word, add_special_tokens=False)
            given["force_words_ids"] = [word]
        helper = {"assistant_model": assistant} if name == "assisted" else {}
        sequences = model.generate(**inputs, **given, **helper)
        tokens = np.asarray(sequences.sequences if options.backend == "flax" else sequences)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        yield name, given, tokenizer.batch_decode(new, skip_special_tokens=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    for name, given, texts in decode(options):
        print(f"{name}: {STRATEGIES[name].what}")
        print("   generate(" + ", ".join(f"{key}={value!r}" for key, value in given.items()) + ")")
        for text in texts:
            print(f"   {options.prompt}|{text}", flush=True)


if __name__ == "__main__":
    main()
