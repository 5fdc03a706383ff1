# SPDX-License-Identifier: Apache-2.0
"""LoRA fine-tuning in TensorFlow with Keras' own adapters, on a base of 32, 8 or 4 bits.

    python examples/lora_tf.py                                    (needs opt-zoo[tf]; a minute)
    python examples/lora_tf.py --model facebook/opt-350m --train-file my.txt --block-size 512 \
        --batch-size 16 --accumulate 4 --learning-rate 2e-4

Learns what `finetune_tf.py` does, but only two narrow matrices beside each linear layer. Writes a
checkpoint of the unrounded base with them added, which all three frameworks load.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from opt_tf import OPTTokenizer, TFOPTForCausalLM  # before keras: it chooses the backend

import keras  # isort: skip
import tensorflow as tf

from examples.finetuning import Run, measured, train_and_held_out
from examples.from_scratch_tf import Trainer, learn
from examples.training import Array, argument_parser
from opt_core.assets import TINY_SUMS

#: Those of each layer. The head stays as it is: it is the word embeddings again.
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

#: How the weights of these layers are rounded, with a scale for each output; activations are not.
BASES: Mapping[str, Callable[..., Any] | None] = {
    "float32": None,
    "int8": keras.quantizers.Int8QuantizationConfig,
    "int4": keras.quantizers.Int4QuantizationConfig,
}


class AdapterTrainer(Trainer):
    """A trainer whose state leaves out the base, which never changes."""

    def _variables(self) -> list[Any]:
        seeds = self.model.model.decoder.seed_generator.state
        return [*self.model.trainable_variables, seeds, *self.optimizer.variables]


def parse(arguments: Sequence[str] | None) -> Namespace:
    plan = {"steps": 300, "batch_size": 32, "learning_rate": 5e-3, "save_every": 100}
    parser = argument_parser(__doc__, output=Path("my-lora"), **plan)
    parser.add_argument("--model", default=str(TINY_SUMS), help="name or folder of an OPT model")
    parser.add_argument("--base", choices=[*BASES], default="int8", help="its weights")
    parser.add_argument("--rank", type=int, default=16, help="width of the matrices")
    parser.add_argument("--train-file", type=Path, help="a text to learn (default: sums)")
    parser.add_argument("--block-size", type=int, default=64, help="tokens of a row of the text")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch")
    options = parser.parse_args(arguments)
    if options.accumulate < 1 or options.batch_size % options.accumulate:
        parser.error(
            f"--accumulate {options.accumulate} does not divide --batch-size {options.batch_size}"
        )
    return options


def adapted(options: Namespace) -> TFOPTForCausalLM:
    """The model with its base rounded and frozen, and adapters that change nothing yet."""
    model = TFOPTForCausalLM.from_pretrained(options.model)
    config = BASES[options.base]
    if config is not None:
        model.quantize(config=config(activation_quantizer=None), filters=TARGETS)
    model.enable_lora(options.rank, 2 * options.rank, TARGETS)
    learnt = sum(variable.numpy().size for variable in model.trainable_variables)
    print(f"{learnt:,} of {model.num_parameters() + learnt:,} parameters learn", flush=True)
    return model


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
    options = parse(arguments)
    keras.utils.set_random_seed(options.seed)
    tokenizer = OPTTokenizer.from_pretrained(options.model)
    train, held_out = train_and_held_out(options, tokenizer)
    model = adapted(options)
    trainer = AdapterTrainer(model, options.learning_rate, options.steps, parts=options.accumulate)
    learn(trainer, train, options, partial(measured, runner(model), held_out, options.batch_size))
    merged = TFOPTForCausalLM.from_pretrained(options.model).merge_lora(model)
    merged.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
