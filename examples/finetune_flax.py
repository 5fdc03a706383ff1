# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of a causal language model in JAX, on a text file or on sums.

    python examples/finetune_flax.py                              (needs opt-zoo[flax], optax; a minute)
    python examples/finetune_flax.py --model facebook/opt-125m --train-file my.txt --block-size 512 \
        --batch-size 16 --accumulate 4 --gradient-checkpointing --learning-rate 5e-5

Writes a checkpoint that all three frameworks load. The same in PyTorch and TensorFlow:
`finetune_torch.py` and `finetune_tf.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from examples.finetuning import measured, parse, train_and_held_out
from examples.from_scratch_flax import Trainer
from examples.training import Array, learn
from opt_flax import FlaxOPTForCausalLM, OPTTokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(__doc__, arguments)
    tokenizer = OPTTokenizer.from_pretrained(options.model)
    train, held_out = train_and_held_out(options, tokenizer)
    dtype = "bfloat16" if options.bfloat16 else "float32"
    model = FlaxOPTForCausalLM.from_pretrained(options.model, dtype=dtype, param_dtype="float32")
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    @jax.jit
    def compiled(params: Any, input_ids: Any, labels: Any) -> tuple[Any, Any]:
        output = model(input_ids, labels=labels, params=params)
        return output.loss, output.logits.argmax(-1)

    def run(input_ids: Array, labels: Array) -> tuple[float, Array]:
        """The loss, and the most likely next token after each."""
        loss, chosen = compiled(model.params, input_ids, labels)
        return float(loss), np.asarray(chosen)

    trainer = Trainer(
        model, options.learning_rate, options.steps, parts=options.accumulate, seed=options.seed
    )
    evaluate = partial(measured, run, held_out, options.batch_size)
    learn(trainer, train, options, evaluate)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
