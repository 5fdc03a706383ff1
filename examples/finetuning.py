# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of a causal language model, whole or by adapters: arguments, data and measures.

The data are the lines of a text file, one after another, cut into blocks; or sums that the embedded model
knows in other words only: "forty-two and seventeen make" asks for " fifty-nine".
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from examples.training import Array, Rows, argument_parser, right_rows
from opt_core.assets import TINY_SUMS
from opt_core.assets.sums import TrainingData, encode_problems, problems
from opt_core.inputs import IGNORED_LABEL
from opt_core.tokenizer import OPTTokenizer

PLAN = {"steps": 300, "batch_size": 32, "save_every": 100}

#: Adapters stand beside those of each layer. The head stays as it is: it is the word embeddings again.
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

#: Runs a model on ids and labels [B, T]: its loss, and the most likely next token after each [B, T].
Run = Callable[[Array, Array], tuple[float, Array]]


def parse(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a script that trains all weights."""
    parser = text_parser(description, output=Path("my-model"), learning_rate=1e-3)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="needs less memory")
    parser.add_argument("--bfloat16", action="store_true", help="computes in mixed precision")
    return checked(parser, arguments)


def adapter_parser(description: str | None, bases: Iterable[str]) -> argparse.ArgumentParser:
    """The arguments of a script that trains adapters, on a base of one of these precisions."""
    parser = text_parser(description, output=Path("my-lora"), learning_rate=5e-3)
    parser.add_argument("--base", choices=[*bases], default="int8", help="its weights")
    parser.add_argument("--rank", type=int, default=16, help="width of the matrices")
    return parser


def text_parser(description: str | None, **defaults: object) -> argparse.ArgumentParser:
    """The arguments of every fine-tuning, with the defaults of this one."""
    parser = argument_parser(description, **PLAN, **defaults)
    parser.add_argument("--model", default=str(TINY_SUMS), help="name or folder of an OPT model")
    parser.add_argument("--train-file", type=Path, help="a text to learn (default: sums)")
    parser.add_argument("--block-size", type=int, default=64, help="tokens of a row of the text")
    parser.add_argument(
        "--accumulate", type=int, default=1, help="parts that a batch is split into"
    )
    return parser


def checked(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the parser finds, if it goes together."""
    options = parser.parse_args(arguments)
    if options.accumulate < 1 or options.batch_size % options.accumulate:
        parser.error(
            f"--accumulate {options.accumulate} does not divide --batch-size {options.batch_size}"
        )
    return options


def train_and_held_out(
    options: argparse.Namespace, tokenizer: OPTTokenizer
) -> tuple[TrainingData, TrainingData]:
    """What is learnt from, and what is not but asked for."""
    if options.train_file is None:
        return reworded_sums(tokenizer, "train"), reworded_sums(tokenizer, "test")
    rows = blocks(tokenizer, options.train_file, options.block_size)
    learnt = len(rows) - max(1, len(rows) // 10)
    if learnt < 1:
        raise SystemExit(
            f"{options.train_file}: has {len(rows)} blocks of {options.block_size} tokens; it takes "
            "one to learn from, and one to hold out. Try a smaller --block-size."
        )
    return TrainingData(rows[:learnt], rows[:learnt]), TrainingData(rows[learnt:], rows[learnt:])


def reworded_sums(tokenizer: OPTTokenizer, split: str) -> TrainingData:
    """The sums of `problems`, asked in other words; what is held out there is so here."""
    sums = [
        (prompt.replace(" plus ", " and ").replace(" is", " make"), answer)
        for prompt, answer in problems(split)
        if " plus " in prompt
    ]
    return encode_problems(tokenizer, sums)


def blocks(tokenizer: OPTTokenizer, file: Path, size: int) -> Array:
    """The lines that are not empty, each after a `</s>`, as rows [rows, size]; what is left is dropped."""
    tokens: list[int] = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise SystemExit(f"{file}, line {number}: expected UTF-8, found {error}") from error
        if text:
            tokens += tokenizer.encode(text)
    rows = len(tokens) // size
    return np.array(tokens[: rows * size], np.int64).reshape(rows, size)


def measured(run: Run, data: Rows, batch_size: int) -> dict[str, float]:
    """The loss for each token and what it means, and how many tokens and whole rows are right.

    All batches have one shape, so that compiled programs serve them: the last one is filled up with rows
    that do not count.
    """
    loss, tokens, rows, counted = 0.0, 0, 0, 0
    for start in range(0, len(data.labels), batch_size):
        end = min(start + batch_size, len(data.labels))
        filled = ((0, batch_size - (end - start)), (0, 0))
        ids = np.pad(data.input_ids[start:end], filled, mode="edge")
        labels = np.pad(data.labels[start:end], filled, constant_values=IGNORED_LABEL)
        of_batch, chosen = run(ids, labels)
        counts = labels[:, 1:] != IGNORED_LABEL
        counted += counts.sum()
        loss += of_batch * counts.sum() if counts.any() else 0.0  # a mean of nothing is none
        tokens += ((chosen[:, :-1] == labels[:, 1:]) & counts).sum()
        rows += right_rows(chosen[: end - start], labels[: end - start])
    return {
        "held_out_loss": float(loss / counted),
        "perplexity": math.exp(loss / counted),
        "tokens_right": float(tokens / counted),
        "rows_right": rows / len(data.labels),
    }
