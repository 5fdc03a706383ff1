# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of a causal language model in TensorFlow, on a text file or on sums.

    python examples/finetune_tf.py                                (needs opt-zoo[tf]; a minute)
    python examples/finetune_tf.py --model facebook/opt-125m --train-file my.txt --block-size 512 \
        --batch-size 16 --accumulate 4 --gradient-checkpointing --learning-rate 5e-5

Writes a checkpoint that all three frameworks load. The same in PyTorch and JAX: `finetune_torch.py` and
`finetune_flax.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from opt_tf import OPTTokenizer, TFOPTForCausalLM  # before keras: it chooses the backend

import keras  # isort: skip
import tensorflow as tf

from examples.finetuning import Run, measured, parse, train_and_held_out
from examples.from_scratch_tf import Trainer, learn
from examples.training import Array


def runner(model: TFOPTForCausalLM) -> Run:
    """The loss of a batch, and the most likely next token after each."""

    @tf.function(jit_compile=True)
    def compiled(input_ids: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        output = model(input_ids, labels=labels, use_cache=False)
        return output.loss, tf.argmax(output.logits, -1)

    def run(input_ids: Array, labels: Array) -> tuple[float, Array]:
        loss, chosen = compiled(tf.constant(input_ids), tf.constant(labels))
        return float(loss), chosen.numpy()

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(__doc__, arguments)
    keras.utils.set_random_seed(options.seed)
    tokenizer = OPTTokenizer.from_pretrained(options.model)
    train, held_out = train_and_held_out(options, tokenizer)
    if options.bfloat16:
        keras.config.set_dtype_policy("mixed_bfloat16")
    model = TFOPTForCausalLM.from_pretrained(options.model)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    trainer = Trainer(model, options.learning_rate, options.steps, parts=options.accumulate)
    learn(trainer, train, options, partial(measured, runner(model), held_out, options.batch_size))
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
