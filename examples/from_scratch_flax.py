# SPDX-License-Identifier: Apache-2.0
"""Training from scratch in JAX: a small OPT learns sums and differences in words.

    python examples/from_scratch_flax.py --output my-sums     (needs opt-zoo[flax], optax; a few minutes)

Writes a checkpoint that all three frameworks load. The same in PyTorch and TensorFlow:
`from_scratch_torch.py` and `from_scratch_tf.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.serialization import from_bytes, to_bytes

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
from opt_flax import FlaxOPTForCausalLM


class Trainer:
    """A model, its optimizer and the rate's course: all that a training changes.

    Args:
        peak: the highest rate.
        parts: in how many of them a batch is computed, one after another, to need less memory.
        weight_decay: as a share of the rate.
        seed: of dropout.
    """

    def __init__(
        self,
        model: FlaxOPTForCausalLM,
        peak: float,
        steps: int,
        *,
        parts: int = 1,
        weight_decay: float = 0.1,
        seed: int = 0,
    ) -> None:
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup(steps), steps)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(LARGEST_NORM), optax.adamw(rate, weight_decay=weight_decay)
        )
        self.model = model
        self.moments = self.optimizer.init(model.params)
        self.random = jax.random.key_data(jax.random.key(seed))
        self.parts, self.step = parts, 0

    def train(self, input_ids: Array, labels: Array) -> float:
        """One step of AdamW; the loss before it."""
        batch = map(np.stack, zip(*parts_of(self.parts, input_ids, labels), strict=True))
        self.model.params, self.moments, loss = self._train(
            self.model.params, self.moments, self.random, self.step, *batch
        )
        self.step += 1
        return float(loss)

    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def _train(
        self,
        params: Any,
        moments: Any,
        random: Any,
        step: int,
        input_ids: Any,
        labels: Any,
        shares: Any,
    ) -> tuple[Any, Any, Any]:
        """The parameters and moments after a step, whose memory is that of those before; the loss.

        Args:
            input_ids, labels: [parts, B, T].
            shares: [parts], of the loss.
        """
        key = jax.random.fold_in(jax.random.wrap_key_data(random), step)

        def loss_of(params: Any, ids: Any, targets: Any, key: Any) -> Any:
            return self.model(ids, labels=targets, params=params, dropout_rng=key, train=True).loss

        def add(total: Any, part: Any) -> tuple[Any, None]:
            *batch, share = part
            found = jax.value_and_grad(loss_of)(params, *batch)
            return jax.tree.map(lambda a, b: a + b * share, total, found), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        each = (input_ids, labels, jax.random.split(key, self.parts), shares)
        (loss, gradients), _ = jax.lax.scan(add, zeros, each)
        updates, moments = self.optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    def save(self, path: Path) -> None:
        """Writes all that the next step depends on."""
        atomic_write(path, to_bytes(self._state()))

    def load(self, path: Path) -> None:
        """Goes on where `save` was called."""
        state = from_bytes(self._state(), path.read_bytes())
        arrays = jax.tree.map(jnp.asarray, state)
        self.model.params, self.moments = arrays["params"], arrays["moments"]
        self.random, self.step = arrays["random"], state["step"]

    def _state(self) -> dict[str, Any]:
        return {
            "params": self.model.params,
            "moments": self.moments,
            "random": self.random,
            "step": self.step,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    options = argument_parser(__doc__, **PLAN).parse_args(arguments)
    tokenizer, data, held_out = tokenizer_and_data()
    model = FlaxOPTForCausalLM(config(len(tokenizer)), seed=options.seed)
    trainer = Trainer(
        model,
        options.learning_rate,
        options.steps,
        weight_decay=WEIGHT_DECAY,
        seed=options.seed,
    )
    compiled = jax.jit(lambda params, ids: model(ids, params=params).logits.argmax(-1))

    def choose(input_ids: Array) -> Array:
        """The most likely next token after each."""
        return np.asarray(compiled(model.params, input_ids))

    learn(trainer, data, options, lambda: {"accuracy": accuracy(choose, held_out)})
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
