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

import io
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
from examples.finetuning import measured, train_and_held_out
from examples.from_scratch_torch import Trainer
from examples.training import argument_parser, learn, write_beside
from opt_core.assets import TINY_SUMS
from opt_torch import OPTForCausalLM, OPTTokenizer

#: Those of each layer. The head stays as it is: it is the word embeddings again.
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


class AdapterTrainer(Trainer):
    """A trainer whose state leaves out the base, which never changes."""

    def save(self, path: Path) -> None:
        weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        state = {name: getattr(self, name).state_dict() for name in ("optimizer", "schedule")}
        state |= {"weights": weights, "step": self.step, "random": torch.get_rng_state()}
        file = io.BytesIO()
        torch.save(state, file)
        write_beside(path, file.getvalue())

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["weights"], strict=False)
        for name in ("optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
        torch.set_rng_state(state["random"])


def is_target(layer: nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] in TARGETS


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


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    tokenizer = OPTTokenizer.from_pretrained(options.model)
    train, held_out = train_and_held_out(options, tokenizer)
    model = OPTForCausalLM.from_pretrained(options.model)
    BASES[options.base](model)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS
    )
    # Nothing is merged into rounded weights here.
    warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated without")
    adapted = get_peft_model(model, config)
    adapted.print_trainable_parameters()
    trainer = AdapterTrainer(
        adapted, options.learning_rate, options.steps, parts=options.accumulate
    )
    evaluate = partial(measured, partial(run, adapted), held_out, options.batch_size)
    learn(trainer, train, options, evaluate)

    adapted.save_pretrained(options.output / "adapter")
    base = OPTForCausalLM.from_pretrained(options.model)
    merged = PeftModel.from_pretrained(base, options.output / "adapter").merge_and_unload()
    merged.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
