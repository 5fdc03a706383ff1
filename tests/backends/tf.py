# SPDX-License-Identifier: Apache-2.0
"""The TensorFlow backend for the shared suite."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import opt_tf  # before keras: it chooses the backend

import keras  # isort: skip
import numpy as np
import tensorflow as tf

from opt_core import GenerationConfig, OPTConfig
from opt_core.generation.plan import DecodePlan
from opt_core.generation.processors import LogitsProcessor
from opt_core.params import param_table
from opt_tf.activations import ACTIVATIONS
from opt_tf.generation.generate import LOOPS
from opt_tf.generation.processors import APPLY, process
from opt_tf.generation.state import DecodeState, StepOutput
from opt_tf.weights import canonical_arrays, find_parameter
from tests.backends.base import CPU_KERNELS, Array, Backend, canonical_shapes, nested, read_output


class TFBackend(Backend):
    name = "tf"
    prefix = "TF"
    package = opt_tf
    kernels = CPU_KERNELS
    applied = frozenset(APPLY)

    def activation(self, name: str, x: Array) -> Array:
        return ACTIVATIONS[name](tf.constant(x)).numpy()

    def load(
        self, path: str | Path, *, architecture: str = "OPTForCausalLM", **options: Any
    ) -> Any:
        return self._class(architecture).from_pretrained(path, **options)

    def create(
        self,
        config: OPTConfig,
        seed: int = 0,
        *,
        architecture: str = "OPTForCausalLM",
        **options: Any,
    ) -> Any:
        keras.utils.set_random_seed(seed)
        return self._class(architecture)(config, **options)

    def save(self, model: Any, path: Path, **options: Any) -> None:
        model.save_pretrained(path, **options)

    def config(self, model: Any) -> OPTConfig:
        return model.config

    def generation_config(self, model: Any) -> GenerationConfig:
        return model.generation_config

    def canonical_weights(self, model: Any) -> dict[str, Array]:
        rows = canonical_arrays(model, model.config, model.architecture)
        return {param.name: read().copy() for param, _, read in rows}

    def shapes(
        self, config: OPTConfig, *, architecture: str = "OPTForCausalLM"
    ) -> dict[str, tuple[int, ...]]:
        with keras.StatelessScope(initialize_variables=False):
            model = self._class(architecture)(config, name="root")
        keras.utils.clear_session()  # forgets the variables that were promised a value
        leaves = {
            tuple(v.path.removeprefix("root/").replace("layers.", "layers/").split("/")): v.shape
            for v in model.weights
        }
        architecture = model.architecture
        return canonical_shapes(param_table(config, architecture), "tf", architecture, leaves)

    def forward(
        self,
        model: Any,
        *,
        train: bool = False,
        seed: int = 0,
        compiled: bool = False,
        **inputs: Any,
    ) -> dict[str, Any]:
        _decoder(model).seed_generator.state.assign([seed, 0])
        output = model(**inputs, training=train)
        return read_output(output, _numpy)

    def gradients(
        self,
        model: Any,
        *,
        train: bool = False,
        seed: int = 0,
        compiled: bool = False,
        **inputs: Any,
    ) -> dict[str, Array]:
        _decoder(model).seed_generator.state.assign([seed, 0])
        rows = param_table(model.config, model.architecture)
        owners = [find_parameter(model, param, model.architecture) for param in rows]
        variables = [getattr(layer, leaf).value for layer, leaf in owners]
        with tf.GradientTape() as tape:
            loss = model(**inputs, training=train).loss
        gradients = tape.gradient(loss, variables, unconnected_gradients="zero")  # dropped layers
        found = [tf.convert_to_tensor(gradient).numpy() for gradient in gradients]
        return {
            param.name: gradient.T if param.transposed("tf") else gradient
            for param, gradient in zip(rows, found, strict=True)
        }

    def init_cache(self, model: Any, batch_size: int, max_length: int) -> Any:
        return model.init_cache(batch_size, max_length)

    def generate(self, model: Any, input_ids: Array | None = None, **options: Any) -> Array:
        return model.generate(input_ids, **options).numpy()

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
            logits, rows = tf.constant(table), tf.constant(tokens, tf.int32)
            room = tf.fill((rows.shape[0], plan.max_new_tokens), plan.pad_token_id)
            buffer = tf.concat([rows, room], axis=1)
            state = DecodeState(
                tokens=buffer,
                mask=tf.ones_like(buffer),
                length=tf.constant(rows.shape[1]),
                prompt_length=tf.constant(rows.shape[1]),
                offset=tf.constant(0),
                limit=tf.constant(plan.max_new_tokens if limit is None else limit),
                finished=tf.zeros(rows.shape[0], tf.bool),
                logits=tf.gather(logits, rows[:, -1]),
                cache=tf.constant(0),  # counts the steps
            )
            return LOOPS[type(plan.strategy)](
                plan,
                state,
                lambda tokens, cache, rows=None: StepOutput(
                    tf.gather(logits, tokens), None, cache + 1
                ),
                None if noise is None else partial(tf.gather, tf.constant(noise)),
                watch,
            )

        found = run() if watch is not None else tf.function(run, jit_compile=True)()
        return found.tokens.numpy(), int(found.length), int(found.cache)

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
            tokens=tf.constant(tokens, tf.int32),
            mask=tf.constant(mask, tf.int32),
            length=tf.constant(length),
            prompt_length=tf.constant(prompt_length),
            offset=tf.constant(offset),
            limit=tf.constant(tokens.shape[1] - prompt_length if limit is None else limit),
            finished=tf.zeros(len(tokens), tf.bool),
            logits=tf.constant(scores),
            cache=None,
            unconditional=None if unconditional is None else tf.constant(unconditional),
            chosen=None if chosen is None else tf.constant(chosen, tf.int32),
        )
        run = partial(process, tuple(processors))
        run = tf.function(run, jit_compile=True, autograph=False) if compiled else run
        return run(state.logits, state).numpy()

    def _class(self, architecture: str) -> Any:
        return getattr(self.package, self.prefix + architecture)


def _decoder(model: Any) -> Any:
    return (model if model.architecture == "OPTModel" else model.model).decoder


def _numpy(value: Any) -> Any:
    if isinstance(value, opt_tf.KVCache):
        value = list(value)
    return nested(value, np.asarray)


BACKEND = TFBackend()
