# SPDX-License-Identifier: Apache-2.0
"""Training from scratch in PyTorch: a small OPT learns sums and differences in words.

    python examples/from_scratch_torch.py --output my-sums     (needs opt-zoo[torch]; a few minutes)

Writes a checkpoint that all three frameworks load. The same in TensorFlow and JAX: `from_scratch_tf.py`
and `from_scratch_flax.py`.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from examples.sums import PLAN, WEIGHT_DECAY, accuracy, config, tokenizer_and_data
from examples.training import (
    LARGEST_NORM,
    Array,
    argument_parser,
    learn,
    parts_of,
    warmup,
)
from opt_core.files import atomic_write
from opt_torch import OPTForCausalLM


class Trainer:
    """A model, its optimizer and the rate's course: all that a training changes.

    Args:
        peak: the highest rate.
        parts: in how many of them a batch is computed, one after another, to need less memory.
        weight_decay: as a share of the rate.
    """

    def __init__(
        self,
        model: OPTForCausalLM,
        peak: float,
        steps: int,
        *,
        parts: int = 1,
        weight_decay: float = 0.1,
    ) -> None:
        warm = warmup(steps)

        def course(step: int) -> float:
            gone = max(0.0, (step - warm) / (steps - warm))
            return min(step / warm, 0.5 * (1 + math.cos(math.pi * gone)))

        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, course)
        self.parts, self.step = parts, 0

    def train(self, input_ids: Array, labels: Array) -> float:
        """One step of AdamW; the loss before it."""
        self.optimizer.zero_grad()
        total = 0.0
        for ids, targets, share in parts_of(self.parts, input_ids, labels):
            output = self.model(
                torch.from_numpy(ids), labels=torch.from_numpy(targets), use_cache=False
            )
            loss: Tensor = output.loss * share
            loss.backward()
            total += loss.item()
        clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return total

    def save(self, path: Path) -> None:
        """Writes all that the next step depends on, but for weights that do not learn."""
        weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        state = {name: getattr(self, name).state_dict() for name in ("optimizer", "schedule")}
        state |= {"weights": weights, "step": self.step, "random": torch.get_rng_state()}
        file = io.BytesIO()
        torch.save(state, file)
        atomic_write(path, file.getvalue())

    def load(self, path: Path) -> None:
        """Goes on where `save` was called."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["weights"], strict=False)
        for name in ("optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
        torch.set_rng_state(state["random"])


@torch.no_grad()
def choose(model: OPTForCausalLM, input_ids: Array) -> Array:
    """The most likely next token after each."""
    model.eval()
    logits = model(torch.from_numpy(input_ids), use_cache=False).logits
    model.train()
    return logits.argmax(-1).numpy()


def main(arguments: Sequence[str] | None = None) -> None:
    options = argument_parser(__doc__, **PLAN).parse_args(arguments)
    torch.manual_seed(options.seed)
    tokenizer, data, held_out = tokenizer_and_data()
    model = OPTForCausalLM(config(len(tokenizer)))
    trainer = Trainer(model, options.learning_rate, options.steps, weight_decay=WEIGHT_DECAY)
    measure = lambda: {"accuracy": accuracy(partial(choose, model), held_out)}
    learn(trainer, data, options, measure)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
