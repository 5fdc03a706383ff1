# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for classification in PyTorch: a model learns the labels of texts, and names those of others.

    python examples/classify_text.py --predict "nine minus forty is"     (needs opt-zoo[torch]; seconds)

Learns from lines `{"text": ..., "label": ...}` of `--train-file`; by default the embedded model, which can
add, learns to tell how large a result is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from examples.from_scratch_torch import Trainer
from examples.json_lines import train_and_held_out
from examples.sentences import SentenceRows, encode, generate, label_ids, read_sentences
from examples.training import Array, argument_parser, learn
from opt_core.assets import TINY_SUMS
from opt_core.tasks import ProblemType
from opt_torch import OPTForSequenceClassification, OPTTokenizer

PLAN = {
    "steps": 100,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "save_every": 50,
    "output": Path("my-classifier"),
}


@torch.no_grad()
def probabilities(
    model: OPTForSequenceClassification, input_ids: Array, batch_size: int = 256
) -> Array:
    """[rows, T] -> [rows, labels]; pads stand on the right, where no token of a text sees them."""
    model.eval()
    parts = torch.from_numpy(input_ids).split(batch_size)
    logits = torch.cat([model(part, use_cache=False).logits for part in parts])
    model.train()
    return logits.softmax(-1).numpy()


def accuracy(model: OPTForSequenceClassification, data: SentenceRows) -> float:
    """The share of texts whose label is the most likely one."""
    return float(np.mean(probabilities(model, data.input_ids).argmax(-1) == data.labels))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__, **PLAN)
    parser.add_argument("--model", default=str(TINY_SUMS), help="name or folder to begin with")
    parser.add_argument("--train-file", type=Path, help="JSON lines of text and label")
    parser.add_argument("--eval-file", type=Path, help="the same, only to measure")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text, at most")
    parser.add_argument("--predict", nargs="+", default=[], help="texts to label in the end")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    tokenizer = OPTTokenizer.from_pretrained(options.model)
    if options.train_file is None:
        train, held_out = generate("train"), generate("test")
    else:
        files = (options.train_file, options.eval_file)
        train, held_out = train_and_held_out(read_sentences, *files)
    label2id = label_ids(train)
    id2label = {number: label for label, number in label2id.items()}
    data, measured = (
        encode(rows, tokenizer, label2id, options.max_length) for rows in (train, held_out)
    )
    model = OPTForSequenceClassification.from_pretrained(
        options.model,
        id2label=id2label,
        label2id=label2id,
        problem_type=ProblemType.SINGLE_LABEL.value,
    )
    trainer = Trainer(model, options.learning_rate, options.steps)
    learn(trainer, data, options, lambda: {"accuracy": accuracy(model, measured)})
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    for text in options.predict:
        ids = tokenizer(text, truncation=True, max_length=options.max_length, return_tensors="np")
        chances = probabilities(model, ids["input_ids"])[0]
        print(f"{text}: {id2label[int(chances.argmax())]} ({chances.max():.1%})")


if __name__ == "__main__":
    main()
