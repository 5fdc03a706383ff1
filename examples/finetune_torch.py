# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of a causal language model in PyTorch, on a text file or on sums.

    python examples/finetune_torch.py                             (needs opt-zoo[torch]; a minute)
    python examples/finetune_torch.py --model facebook/opt-125m --train-file my.txt --block-size 512 \
        --batch-size 16 --accumulate 4 --gradient-checkpointing --learning-rate 5e-5

Writes a checkpoint that all three frameworks load. The same in TensorFlow and JAX: `finetune_tf.py` and
`finetune_flax.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from examples.finetuning import measured, parse, train_and_held_out
from examples.from_scratch_torch import Trainer
from examples.training import Array, learn
from opt_torch import OPTForCausalLM, OPTTokenizer


@torch.no_grad()
def run(model: OPTForCausalLM, input_ids: Array, labels: Array) -> tuple[float, Array]:
    """The loss, and the most likely next token after each."""
    model.eval()
    output = model(torch.from_numpy(input_ids), labels=torch.from_numpy(labels), use_cache=False)
    model.train()
    return output.loss.item(), output.logits.argmax(-1).numpy()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(__doc__, arguments)
    torch.manual_seed(options.seed)
    tokenizer = OPTTokenizer.from_pretrained(options.model)
    train, held_out = train_and_held_out(options, tokenizer)
    model = OPTForCausalLM.from_pretrained(options.model)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if options.bfloat16:
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    trainer = Trainer(model, options.learning_rate, options.steps, parts=options.accumulate)
    evaluate = partial(measured, partial(run, model), held_out, options.batch_size)
    learn(trainer, train, options, evaluate)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
