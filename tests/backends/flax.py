# SPDX-License-Identifier: Apache-2.0
"""The JAX/Flax backend for the shared suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import opt_flax
from opt_core import GenerationConfig, OPTConfig
from opt_core.generation.processors import LogitsProcessor
from opt_core.params import param_table
from opt_flax.activations import ACTIVATIONS
from opt_flax.attention import KERNELS
from opt_flax.generation.processors import APPLY, process
from opt_flax.generation.state import DecodeState
from opt_flax.weights import canonical_arrays
from tests.backends.base import Array, Backend, canonical_shapes, nested, read_output


class FlaxBackend(Backend):
    name = "flax"
    prefix = "Flax"
    package = opt_flax
    kernels = tuple(KERNELS)
    applied = frozenset(APPLY)

    def activation(self, name: str, x: Array) -> Array:
        return np.asarray(ACTIVATIONS[name](jnp.asarray(x)))

    def load(self, path: str | Path, *, base: bool = False, **options: Any) -> Any:
        return self._class(base).from_pretrained(path, **options)

    def create(
        self, config: OPTConfig, seed: int = 0, *, base: bool = False, **options: Any
    ) -> Any:
        return self._class(base)(config, seed=seed, **options)

    def save(self, model: Any, path: Path, **options: Any) -> None:
        model.save_pretrained(path, **options)

    def config(self, model: Any) -> OPTConfig:
        return model.config

    def generation_config(self, model: Any) -> GenerationConfig:
        return model.generation_config

    def canonical_weights(self, model: Any) -> dict[str, Array]:
        rows = canonical_arrays(model.params, model.config, model.architecture)
        return {param.name: read().copy() for param, _, read in rows}

    def shapes(self, config: OPTConfig, *, base: bool = False) -> dict[str, tuple[int, ...]]:
        model = self._class(base)(config, _do_init=False)
        ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        tree = jax.eval_shape(model.module.init, jax.random.key(0), ids)["params"]
        leaves = {path: leaf.shape for path, leaf in flatten_dict(tree).items()}
        architecture = model.architecture
        return canonical_shapes(param_table(config, architecture), "flax", architecture, leaves)

    def forward(
        self, model: Any, *, train: bool = False, seed: int = 0, **inputs: Any
    ) -> dict[str, Any]:
        # As in the reference, a Flax model returns a cache by default only where one was given; the
        # suite's default is that of the configuration.
        inputs = {"use_cache": model.config.use_cache, **inputs}
        output = model(**inputs, train=train, dropout_rng=jax.random.key(seed))
        return read_output(output, _numpy)

    def gradients(self, model: Any, **inputs: Any) -> dict[str, Array]:
        tree = jax.grad(lambda params: model(**inputs, params=params).loss)(model.params)
        rows = canonical_arrays(tree, model.config, model.architecture)
        return {param.name: read() for param, _, read in rows}

    def init_cache(self, model: Any, batch_size: int, max_length: int) -> Any:
        return model.init_cache(batch_size, max_length)

    def generate(self, model: Any, input_ids: Array | None = None, **options: Any) -> Array:
        return np.asarray(model.generate(input_ids, **options).sequences)

    def process(
        self,
        processors: Sequence[LogitsProcessor],
        scores: Array,
        tokens: Array,
        mask: Array,
        length: int,
        prompt_length: int,
    ) -> Array:
        state = DecodeState(
            tokens=jnp.asarray(tokens),
            mask=jnp.asarray(mask),
            length=jnp.asarray(length),
            prompt_length=prompt_length,
            finished=jnp.zeros(len(tokens), bool),
            logits=jnp.asarray(scores),
            cache=None,
        )
        return np.asarray(process(tuple(processors), state.logits, state))

    def _class(self, base: bool) -> Any:
        return opt_flax.FlaxOPTModel if base else opt_flax.FlaxOPTForCausalLM


def _numpy(value: Any) -> Any:
    return nested(value, np.asarray)


BACKEND = FlaxBackend()
