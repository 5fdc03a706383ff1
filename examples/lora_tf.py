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

from examples.finetune_tf import runner
from examples.finetuning import (
    LORA_TARGETS,
    adapter_parser,
    checked,
    measured,
    train_and_held_out,
)
from examples.from_scratch_tf import Trainer, learn

#: How the weights of these layers are rounded, with a scale for each output; activations are not.
BASES: Mapping[str, Callable[..., Any] | None] = {
    "float32": None,
    "int8": keras.quantizers.Int8QuantizationConfig,
    "int4": keras.quantizers.Int4QuantizationConfig,
}


def parse(arguments: Sequence[str] | None) -> Namespace:
    return checked(adapter_parser(__doc__, BASES), arguments)


def adapted(options: Namespace) -> TFOPTForCausalLM:
    """The model with its base rounded and frozen, and adapters that change nothing yet."""
    model = TFOPTForCausalLM.from_pretrained(options.model)
    config = BASES[options.base]
    if config is not None:
        model.quantize(config=config(activation_quantizer=None), filters=LORA_TARGETS)
    model.enable_lora(options.rank, 2 * options.rank, LORA_TARGETS)
    learnt = sum(variable.numpy().size for variable in model.trainable_variables)
    print(f"{learnt:,} of {model.num_parameters() + learnt:,} parameters learn", flush=True)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    keras.utils.set_random_seed(options.seed)
    tokenizer = OPTTokenizer.from_pretrained(options.model)
    train, held_out = train_and_held_out(options, tokenizer)
    model = adapted(options)
    trainer = Trainer(model, options.learning_rate, options.steps, parts=options.accumulate)
    learn(trainer, train, options, partial(measured, runner(model), held_out, options.batch_size))
    merged = TFOPTForCausalLM.from_pretrained(options.model).merge_lora(model)
    merged.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
