# SPDX-License-Identifier: Apache-2.0
"""LoRA fine-tuning in PyTorch with PEFT, on a base of 32, 8 or 4 bits.

    python examples/lora_torch.py      (needs opt-zoo[torch,int8] and peft; a minute)
    python examples/lora_torch.py --model facebook/opt-1.3b --base nf4 --train-file my.txt \
        --block-size 512 --batch-size 16 --accumulate 16 --learning-rate 2e-4   (and bitsandbytes)

Learns what `finetune_torch.py` does, but no more than two narrow matrices beside each linear layer.
Writes them into the folder `adapter`, and beside it a checkpoint of the unrounded base with them added,
which all three frameworks load.
"""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from examples.finetune_torch import run
from examples.finetuning import (
    LORA_TARGETS,
    adapter_parser,
    checked,
    measured,
    train_and_held_out,
)
from examples.from_scratch_torch import Trainer
from examples.training import learn
from opt_torch import OPTForCausalLM, OPTTokenizer


def is_target(layer: nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] in LORA_TARGETS


def round_to_int8(model: OPTForCausalLM) -> None:
    """Weights of 8 bits, and a scale for each output of a layer."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_target)


def round_to_nf4(model: OPTForCausalLM) -> None:
    """Weights of 16 different values, and a scale for each 64 of them."""
    from bitsandbytes.nn import Linear4bit

    for name, layer in [*model.named_modules()]:
        if is_target(layer, name):
            parent, _, leaf = name.rpartition(".")
            size = layer.in_features, layer.out_features
            rounded = Linear4bit(*size, compute_dtype=torch.float32, quant_type="nf4")
            # Evaluation would lay the weights out for itself, and training could not read them.
            rounded.support_avx512bf16_for_cpu = False
            rounded.load_state_dict(layer.state_dict())
            model.get_submodule(parent).add_module(leaf, rounded.to("cpu"))  # which rounds


BASES: Mapping[str, Callable[[OPTForCausalLM], None]] = {
    "float32": lambda model: None,
    "int8": round_to_int8,
    "nf4": round_to_nf4,
}


def parse(arguments: Sequence[str] | None) -> Namespace:
    return checked(adapter_parser(__doc__, BASES), arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    tokenizer = OPTTokenizer.from_pretrained(options.model)
    train, held_out = train_and_held_out(options, tokenizer)
    model = OPTForCausalLM.from_pretrained(options.model)
    BASES[options.base](model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=LORA_TARGETS,
    )
    # Nothing is merged into rounded weights here.
    warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated without")
    adapted = get_peft_model(model, config)
    adapted.print_trainable_parameters()
    trainer = Trainer(adapted, options.learning_rate, options.steps, parts=options.accumulate)
    evaluate = partial(measured, partial(run, adapted), held_out, options.batch_size)
    learn(trainer, train, options, evaluate)

    adapted.save_pretrained(options.output / "adapter")
    base = OPTForCausalLM.from_pretrained(options.model)
    merged = PeftModel.from_pretrained(base, options.output / "adapter").merge_and_unload()
    merged.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
