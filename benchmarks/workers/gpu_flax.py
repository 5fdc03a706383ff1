# SPDX-License-Identifier: Apache-2.0
"""Cases of `benchmarks/gpu.py` in JAX: `python gpu_flax.py REQUEST`; see `gpu_race.serve`."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs in a source tree, installed or not

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_case import Case
from benchmarks.gpu_race import Contestant, Distance, Makers, Request, serve
from benchmarks.gpu_table import COMPARED_ROWS, LIMITS, config_of, new_tokens
from opt_core import UnsupportedError
from opt_flax import FlaxOPTForCausalLM

DTYPE = "bfloat16"
#: Of AdamW, so small that the weights stay where they are.
LEARNING_RATE = 1e-7


class JaxDevice:
    """The device that JAX computes on; it tells no memory of a single call."""

    excuses: tuple[type[Exception], ...] = (jax.errors.JaxRuntimeError, UnsupportedError)

    def seconds(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    def peak(self, call: Callable[[], object]) -> None:
        jax.block_until_ready(call())

    def free(self) -> None:
        gc.collect()


class Models:
    """Models of one size, which share their parameters."""

    def __init__(self, case: Case) -> None:
        self.config = config_of(case.size)
        rng = np.random.default_rng([case.batch, case.length])
        tokens = rng.integers(4, self.config.vocab_size, (case.batch, case.length))
        self.tokens = jnp.asarray(tokens, jnp.int32)  # [B, T]
        self.params = self.initial_params()

    def initial_params(self) -> Any:
        return self.model(None, _do_init=True).params

    def model(self, attention: str | None, *, _do_init: bool = False) -> FlaxOPTForCausalLM:
        return FlaxOPTForCausalLM(
            self.config,
            dtype=DTYPE,
            param_dtype=DTYPE,
            attn_implementation=attention,
            _do_init=_do_init,
        )

    def logits(self, model: FlaxOPTForCausalLM) -> np.ndarray:
        """[tokens, V] of a few rows."""
        call = jax.jit(lambda params, tokens: model(tokens, params=params).logits)
        return np.asarray(call(self.params, self.tokens[:COMPARED_ROWS]).astype(jnp.float32))


def relative_distance(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference over the largest number."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def generating(models: Models, new: int, attention: str | None) -> Contestant:
    model = models.model(attention)
    model.params = models.params

    def run() -> Any:
        output = model.generate(
            models.tokens, max_new_tokens=new, eos_token_id=None, do_sample=False
        )
        return output.sequences

    return Contestant(partial(models.logits, model), run, LIMITS[DTYPE])


class Training:
    """Steps of AdamW, with whichever attention, on the same parameters with the same moments."""

    def __init__(self, models: Models) -> None:
        import optax  # whoever does not train needs none

        self.models = models
        self.optimizer = optax.adamw(LEARNING_RATE)
        self.update = optax.apply_updates
        self.state = self._first_state()

    def _first_state(self) -> Any:
        params = self.models.params
        return params, self.optimizer.init(params), jax.random.key(0)

    def contestant(self, attention: str | None) -> Contestant:
        model = self.models.model(attention)
        step = jax.jit(partial(self._step, model), donate_argnums=0)

        def run() -> jax.Array:
            if any(x.is_deleted() for x in jax.tree.leaves(self.state)):  # by a step that failed
                self.models.params = self.models.initial_params()
                self.state = self._first_state()
            self.state, loss = step(self.state, self.models.tokens)
            self.models.params = self.state[0]
            return loss

        return Contestant(partial(self.models.logits, model), run, LIMITS[DTYPE])

    def _step(self, model: FlaxOPTForCausalLM, state: Any, tokens: jax.Array) -> Any:
        params, moments, key = state
        key, dropout_key = jax.random.split(key)

        def loss_of(params: Any) -> jax.Array:
            return model(
                tokens, labels=tokens, params=params, dropout_rng=dropout_key, train=True
            ).loss

        loss, gradients = jax.value_and_grad(loss_of)(params)
        changes, moments = self.optimizer.update(gradients, moments, params)
        return (self.update(params, changes), moments, key), loss


def contest(case: Case) -> tuple[Makers, Distance]:
    """With attention as it comes, and with cuDNN's."""
    models = Models(case)
    make = partial(generating, models, new_tokens(case.section, case.size))
    if case.section == "training":
        make = Training(models).contestant
    return {"ours": partial(make, None), "ours cudnn": partial(make, "cudnn")}, relative_distance


def main() -> None:
    serve(Request.read(sys.argv[1]), contest, JaxDevice())


if __name__ == "__main__":
    main()
