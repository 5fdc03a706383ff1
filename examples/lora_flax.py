# SPDX-License-Identifier: Apache-2.0
"""LoRA fine-tuning in JAX with qwix, on a base of 32, 8 or 4 bits.

    python examples/lora_flax.py --base int8          (needs opt-zoo[flax], optax and qwix; two minutes)
    python examples/lora_flax.py --model facebook/opt-1.3b --base nf4 --train-file my.txt \
        --block-size 512 --batch-size 16 --accumulate 16 --learning-rate 2e-4

Learns what `finetune_flax.py` does, but only two narrow matrices beside each linear layer. Writes a
checkpoint of the unrounded base with them added, which all three frameworks load. The same in PyTorch:
`lora_torch.py`.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import qwix
from flax.serialization import from_bytes, to_bytes
from flax.traverse_util import flatten_dict, unflatten_dict

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from examples.finetuning import adapter_parser, checked, measured, train_and_held_out
from examples.training import (
    LARGEST_NORM,
    Array,
    learn,
    parts_of,
    warmup,
)
from opt_core.files import atomic_write
from opt_flax import FlaxOPTForCausalLM, OPTTokenizer

Tree = dict[str, Any]  # by path, such as "model/decoder/layers/0/fc1/kernel"

#: Linear layers, not the embeddings: the head is the word embeddings again.
TARGETS = r".*/layers/\d+/.*"
#: What qwix puts beside a matrix: its change is the product of the two.
LEFT, RIGHT = "_lora_a", "_lora_b"
ROUNDED = {"float32": None, "int8": "int8", "nf4": "nf4"}
SCALE = 2.0  # of the change


def adapted(
    model: FlaxOPTForCausalLM, targets: str, rank: int, rounded: str | None, seed: int
) -> tuple[Tree, Tree]:
    """Gives the model adapters; returns what stays, rounded or not, and the adapters, drawn anew."""
    rule = qwix.LoraRule(module_path=targets, rank=rank, alpha=SCALE * rank, weight_qtype=rounded)
    model.module = qwix.apply_lora_to_model(model.module, qwix.LoraProvider([rule]))

    def draw(key: Any) -> Tree:
        drawn = flatten_dict(model.module.init(key, np.ones((1, 2), int))["params"], sep="/")
        return {path: leaf for path, leaf in drawn.items() if path.endswith((LEFT, RIGHT))}

    shapes = jax.eval_shape(model.module.init, jax.random.key(seed), np.ones((1, 2), int))
    base = flatten_dict(qwix.quantize_params(model.params, shapes["params"]), sep="/")
    adapters = jax.jit(draw)(jax.random.key(seed))
    if not adapters:
        raise SystemExit(f"--targets {targets}: matches no linear layer of {sorted(base)}")
    return base, adapters


def merged(base: Tree, adapters: Tree) -> dict[str, Any]:
    """The parameters of a plain model that does what the base, which is not rounded, and adapters do."""
    changes = {
        path.removesuffix(LEFT): SCALE * (left @ adapters[path.removesuffix(LEFT) + RIGHT])
        for path, left in adapters.items()
        if path.endswith(LEFT)
    }
    return unflatten_dict({p: x + changes.get(p, 0) for p, x in base.items()}, sep="/")


class AdapterTrainer:
    """Adapters, their optimizer and the rate's course; the base never changes."""

    def __init__(self, model: FlaxOPTForCausalLM, options: Namespace) -> None:
        rounded, seed = ROUNDED[options.base], options.seed
        self.model = model
        self.base, self.adapters = adapted(model, options.targets, options.rank, rounded, seed)
        steps, peak = options.steps, options.learning_rate
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup(steps), steps)
        step = optax.chain(optax.clip_by_global_norm(LARGEST_NORM), optax.adamw(rate))
        self.parts = options.accumulate
        self.optimizer = optax.MultiSteps(step, self.parts)  # which takes the mean of the parts
        self.moments = self.optimizer.init(self.adapters)
        self.random = jax.random.key_data(jax.random.key(seed))
        self.step = 0

    def train(self, input_ids: Array, labels: Array) -> float:
        """One step of AdamW; the loss before it."""
        losses = []
        for *part, share in parts_of(self.parts, input_ids, labels):
            self.adapters, self.moments, self.random, loss = self._train(
                self.base, self.adapters, self.moments, self.random, *part, share * self.parts
            )
            losses.append(loss)
        self.step += 1
        return float(np.mean(losses))

    @partial(jax.jit, static_argnums=0, donate_argnums=(2, 3, 4))
    def _train(
        self,
        base: Tree,
        adapters: Tree,
        moments: Any,
        random: Any,
        ids: Any,
        labels: Any,
        weight: Any,
    ) -> tuple[Tree, Any, Any, Any]:
        """The adapters, moments and random state after a part of a batch [B, T], and its loss.

        Args:
            weight: of the part in the mean of all.
        """
        key, following = jax.random.split(jax.random.wrap_key_data(random))

        def loss_of(adapters: Tree) -> Any:
            params = unflatten_dict(base | adapters, sep="/")
            output = self.model(ids, labels=labels, params=params, dropout_rng=key, train=True)
            return output.loss * weight

        loss, gradients = jax.value_and_grad(loss_of)(adapters)
        updates, moments = self.optimizer.update(gradients, moments, adapters)
        adapters = optax.apply_updates(adapters, updates)
        return adapters, moments, jax.random.key_data(following), loss

    @partial(jax.jit, static_argnums=0)
    def _evaluate(self, base: Tree, adapters: Tree, ids: Any, labels: Any) -> tuple[Any, Any]:
        params = unflatten_dict(base | adapters, sep="/")
        output = self.model(ids, labels=labels, params=params)
        return output.loss, output.logits.argmax(-1)

    def evaluate(self, input_ids: Array, labels: Array) -> tuple[float, Array]:
        """The loss, and the most likely next token after each."""
        loss, chosen = self._evaluate(self.base, self.adapters, input_ids, labels)
        return float(loss), np.asarray(chosen)

    def save(self, path: Path) -> None:
        """Writes all that the next step depends on, but for the base."""
        atomic_write(path, to_bytes(self._state()))

    def load(self, path: Path) -> None:
        """Goes on where `save` was called."""
        state = from_bytes(self._state(), path.read_bytes())
        self.adapters, self.moments, self.random, self.step = state.values()

    def _state(self) -> dict[str, Any]:
        kept = ("adapters", "moments", "random", "step")
        return {name: getattr(self, name) for name in kept}


def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = adapter_parser(__doc__, ROUNDED)
    parser.add_argument("--targets", default=TARGETS, help="adapted modules, a regular expression")
    return checked(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    tokenizer = OPTTokenizer.from_pretrained(options.model)
    train, held_out = train_and_held_out(options, tokenizer)
    load = partial(FlaxOPTForCausalLM.from_pretrained, options.model, param_dtype="float32")
    trainer = AdapterTrainer(load(), options)
    evaluate = partial(measured, trainer.evaluate, held_out, options.batch_size)
    learn(trainer, train, options, evaluate)

    unrounded = load()
    base = flatten_dict(unrounded.params, sep="/")
    unrounded.save_pretrained(options.output, params=merged(base, trainer.adapters))
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
