# SPDX-License-Identifier: Apache-2.0
"""Training in JAX: `python train_flax.py CHECKPOINT ours|transformers DROPOUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from serving import LEARNING_RATE, WEIGHT_DECAY, Tokens, Trainer, serve

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs in a source tree, installed or not


def model_class(owner: str) -> Any:
    if owner == "ours":
        from opt_flax import FlaxOPTForCausalLM
    else:
        from transformers import FlaxOPTForCausalLM
    return FlaxOPTForCausalLM


class FlaxTrainer(Trainer):
    """One jitted step for whichever model; parameters and optimizer's state are donated."""

    def __init__(self, checkpoint: str, owner: str, dropout: str) -> None:
        self.modules = ("jax", "flax", "optax")
        if owner == "transformers":
            self.modules = (owner, *self.modules)
        options: dict[str, Any] = {"dropout": float(dropout)}
        if owner == "ours":
            options["param_dtype"] = "float32"
        self.model = model_class(owner).from_pretrained(checkpoint, **options)
        self.optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        params = self.model.params
        self.state = (params, self.optimizer.init(params), jax.random.PRNGKey(0))
        self.step = jax.jit(self._step, donate_argnums=0)

    def _step(self, state: Any, batch: jax.Array) -> Any:
        params, moments, key = state
        key, dropout_key = jax.random.split(key)

        def loss_of(params: Any) -> jax.Array:
            output = self.model(batch, params=params, dropout_rng=dropout_key, deterministic=False)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                output.logits[:, :-1], batch[:, 1:]
            )
            return losses.mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        changes, moments = self.optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, changes), moments, key), loss

    def train(self, batches: list[Tokens]) -> float:
        losses = []
        for batch in jnp.asarray(batches, jnp.int32):
            self.state, loss = self.step(self.state, batch)
            losses.append(loss)
        return float(jnp.stack(losses).mean())


if __name__ == "__main__":
    serve(FlaxTrainer)
