# SPDX-License-Identifier: Apache-2.0
"""The JAX/Flax backend for the shared suite."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import opt_flax
from opt_core import GenerationConfig, OPTConfig
from opt_core.generation.plan import DecodePlan
from opt_core.generation.processors import LogitsProcessor
from opt_core.params import param_table
from opt_flax.activations import ACTIVATIONS
from opt_flax.generation.generate import LOOPS
from opt_flax.generation.processors import APPLY, process
from opt_flax.generation.state import DecodeState, StepOutput
from opt_flax.weights import canonical_arrays
from tests.backends.base import CPU_KERNELS, Array, Backend, canonical_shapes, nested, read_output


class FlaxBackend(Backend):
    name = "flax"
    prefix = "Flax"
    package = opt_flax
    kernels = CPU_KERNELS
    applied = frozenset(APPLY)

    def activation(self, name: str, x: Array) -> Array:
        return np.asarray(ACTIVATIONS[name](jnp.asarray(x)))

    def load(
        self, path: str | Path, *, architecture: str = "OPTForCausalLM", **options: Any
    ) -> Any:
        # Parameters keep the file's dtype in Flax; the suite means that of parameters and computation.
        asked = [options[key] for key in ("dtype", "torch_dtype") if options.get(key) is not None]
        options = {"param_dtype": asked[0] if asked else "float32", **options}
        return self._class(architecture).from_pretrained(path, **options)

    def create(
        self,
        config: OPTConfig,
        seed: int = 0,
        *,
        architecture: str = "OPTForCausalLM",
        **options: Any,
    ) -> Any:
        return self._class(architecture)(config, seed=seed, **options)

    def save(self, model: Any, path: Path, **options: Any) -> None:
        model.save_pretrained(path, **options)

    def config(self, model: Any) -> OPTConfig:
        return model.config

    def generation_config(self, model: Any) -> GenerationConfig:
        return model.generation_config

    def canonical_weights(self, model: Any) -> dict[str, Array]:
        rows = canonical_arrays(model.params, model.config, model.architecture)
        return {param.name: read().copy() for param, _, read in rows}

    def shapes(
        self, config: OPTConfig, *, architecture: str = "OPTForCausalLM"
    ) -> dict[str, tuple[int, ...]]:
        model = self._class(architecture)(config, _do_init=False)
        ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        tree = jax.eval_shape(model.module.init, jax.random.key(0), ids)["params"]
        leaves = {path: leaf.shape for path, leaf in flatten_dict(tree).items()}
        architecture = model.architecture
        return canonical_shapes(param_table(config, architecture), "flax", architecture, leaves)

    def forward(
        self,
        model: Any,
        *,
        train: bool = False,
        seed: int = 0,
        compiled: bool = False,
        **inputs: Any,
    ) -> dict[str, Any]:
        # As in the reference, a Flax model returns a cache by default only where one was given; the
        # suite's default is that of the configuration.
        inputs = {"use_cache": model.config.use_cache, "train": train, **inputs}
        return read_output(_run(call, compiled, model, inputs, seed), _numpy)

    def gradients(
        self,
        model: Any,
        *,
        train: bool = False,
        seed: int = 0,
        compiled: bool = False,
        **inputs: Any,
    ) -> dict[str, Array]:
        tree = _run(gradients, compiled, model, {"train": train, **inputs}, seed)
        rows = canonical_arrays(tree, model.config, model.architecture)
        return {param.name: read() for param, _, read in rows}

    def init_cache(self, model: Any, batch_size: int, max_length: int) -> Any:
        return model.init_cache(batch_size, max_length)

    def generate(self, model: Any, input_ids: Array | None = None, **options: Any) -> Array:
        return np.asarray(model.generate(input_ids, **options).sequences)

    def generate_output(
        self, model: Any, input_ids: Array | None = None, **options: Any
    ) -> dict[str, Any]:
        output = model.generate(input_ids, return_dict_in_generate=True, **options)
        return read_output(output, _numpy)

    def decode(
        self,
        plan: DecodePlan,
        tokens: Array,
        table: Array,
        *,
        limit: int | None = None,
        noise: Array | None = None,
        watch: Any = None,
    ) -> tuple[Array, int, int]:
        def run() -> Any:
            logits, rows = jnp.asarray(table), jnp.asarray(tokens, jnp.int32)
            room = jnp.full((len(rows), plan.max_new_tokens), plan.pad_token_id)
            buffer = jnp.concatenate([rows, room], axis=1)
            state = DecodeState(
                tokens=buffer,
                mask=jnp.ones_like(buffer),
                length=jnp.asarray(rows.shape[1], jnp.int32),
                prompt_length=rows.shape[1],
                offset=jnp.asarray(0, jnp.int32),
                limit=jnp.asarray(plan.max_new_tokens if limit is None else limit, jnp.int32),
                finished=jnp.zeros(len(rows), bool),
                logits=logits[rows[:, -1]],
                cache=jnp.asarray(0),  # counts the steps
            )
            return LOOPS[type(plan.strategy)](
                plan,
                state,
                lambda tokens, cache, rows=None: StepOutput(logits[tokens], None, cache + 1),
                None if noise is None else jnp.asarray(noise).__getitem__,
                watch,
            )

        found = run() if watch is not None else jax.jit(run)()
        return np.asarray(found.tokens), int(found.length), int(found.cache)

    def process(
        self,
        processors: Sequence[LogitsProcessor],
        scores: Array,
        tokens: Array,
        mask: Array,
        length: int,
        prompt_length: int,
        *,
        offset: int = 0,
        limit: int | None = None,
        unconditional: Array | None = None,
        chosen: Array | None = None,
        compiled: bool = False,
    ) -> Array:
        state = DecodeState(
            tokens=jnp.asarray(tokens),
            mask=jnp.asarray(mask),
            length=jnp.asarray(length),
            prompt_length=prompt_length,
            offset=jnp.asarray(offset),
            limit=jnp.asarray(tokens.shape[1] - prompt_length if limit is None else limit),
            finished=jnp.zeros(len(tokens), bool),
            logits=jnp.asarray(scores),
            cache=None,
            unconditional=None if unconditional is None else jnp.asarray(unconditional),
            chosen=None if chosen is None else jnp.asarray(chosen),
        )
        run = partial(process, tuple(processors))
        run = jax.jit(run) if compiled else run
        return np.asarray(run(state.logits, state))

    def _class(self, architecture: str) -> Any:
        return getattr(self.package, self.prefix + architecture)


def call(params: Any, model: Any, flags: Any, seed: Any, arrays: Any) -> Any:
    """A model's output with other parameters than its own."""
    return model(**arrays, **flags, params=params, dropout_rng=jax.random.key(seed))


def gradients(params: Any, *arguments: Any) -> Any:
    """The gradient of the loss that `call` returns."""
    return jax.grad(lambda params: call(params, *arguments).loss)(params)


@partial(jax.jit, static_argnames=("function", "kind", "module", "flags"))
def _compiled(
    function: Any, params: Any, kind: Any, module: Any, flags: Any, seed: Any, arrays: Any
) -> Any:
    """One program for all models of a class and a configuration."""
    model = kind(module.config, _do_init=False)
    model.module = module
    return function(params, model, dict(flags), seed, arrays)


def _run(function: Any, compiled: bool, model: Any, inputs: dict[str, Any], seed: int) -> Any:
    """`call` or `gradients`, for which inputs that are no arrays are constants."""
    flags = {k: v for k, v in inputs.items() if v is None or isinstance(v, bool)}
    arrays = {k: v for k, v in inputs.items() if k not in flags}
    if not compiled:
        return function(model.params, model, flags, seed, arrays)
    constants = {"kind": type(model), "module": model.module, "flags": tuple(flags.items())}
    return _compiled(function, model.params, **constants, seed=seed, arrays=arrays)


def _numpy(value: Any) -> Any:
    return nested(value, np.asarray)


BACKEND = FlaxBackend()
