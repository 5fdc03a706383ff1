# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for question answering in PyTorch: a model learns to find answers in documents of any length.

    python examples/answer_questions.py     (needs opt-zoo[torch]; a minute)

Learns from lines in the shape of SQuAD's of `--train-file`; by default the embedded model learns to find
numbers in rows of them. For a published OPT, `--max-length 384 --stride 128 --max-answer-length 30` fit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from examples.from_scratch_torch import Trainer
from examples.json_lines import train_and_held_out
from examples.questions import (
    Question,
    Windows,
    best_answers,
    cut,
    generate,
    judge,
    read_questions,
)
from examples.training import argument_parser, learn
from opt_core.assets import TINY_SUMS
from opt_torch import OPTForQuestionAnswering, OPTTokenizer

PLAN = {
    "steps": 200,
    "batch_size": 32,
    "learning_rate": 3e-3,
    "save_every": 100,
    "output": Path("my-answers"),
}


class SpanModel(OPTForQuestionAnswering):
    """Takes both ends of the answers as labels [B, 2], as the trainer gives them."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        if labels is not None:
            options["start_positions"], options["end_positions"] = labels.unbind(-1)
        return super().forward(input_ids, **options)


@torch.no_grad()
def answers(
    model: SpanModel, questions: Sequence[Question], windows: Windows, longest: int
) -> list[str]:
    """The likeliest answers of up to so many tokens."""
    model.eval()
    parts = torch.from_numpy(windows.input_ids).split(64)
    outputs = [model(part, use_cache=False) for part in parts]
    starts = torch.cat([output.start_logits for output in outputs])  # [W, T]
    ends = torch.cat([output.end_logits for output in outputs])
    model.train()
    return best_answers(questions, windows, starts.numpy(), ends.numpy(), longest)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__, **PLAN)
    parser.add_argument("--model", default=str(TINY_SUMS), help="name or folder to begin with")
    parser.add_argument("--train-file", type=Path, help="JSON lines in the shape of SQuAD's")
    parser.add_argument("--eval-file", type=Path, help="the same, only to measure")
    parser.add_argument("--max-length", type=int, default=48, help="tokens of a window")
    parser.add_argument("--stride", type=int, default=12, help="tokens that windows share")
    parser.add_argument("--max-answer-length", type=int, default=8, help="in tokens")
    parser.add_argument(
        "--predict",
        nargs=2,
        metavar=("QUESTION", "DOCUMENT"),
        help="a question to answer in the end",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    tokenizer = OPTTokenizer.from_pretrained(options.model)
    if options.train_file is None:
        train, held_out = generate(2000, 20, seed=0), generate(100, 50, seed=1)
    else:
        files = (options.train_file, options.eval_file)
        train, held_out = train_and_held_out(read_questions, *files)
    data, measured = (
        cut(questions, tokenizer, options.max_length, options.stride)
        for questions in (train, held_out)
    )
    model = SpanModel.from_pretrained(options.model)
    longest = options.max_answer_length
    trainer = Trainer(model, options.learning_rate, options.steps)
    learn(
        trainer, data, options, lambda: judge(answers(model, held_out, measured, longest), held_out)
    )
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    if options.predict:
        question, context = options.predict
        asked = [Question(context, question)]
        windows = cut(asked, tokenizer, options.max_length, options.stride)
        print(f"{question} {answers(model, asked, windows, longest)[0]}")


if __name__ == "__main__":
    main()
