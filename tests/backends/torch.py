# SPDX-License-Identifier: Apache-2.0
"""The PyTorch backend for the shared suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import opt_torch
from opt_core import GenerationConfig, OPTConfig
from opt_core.generation.plan import DecodePlan
from opt_core.generation.processors import LogitsProcessor
from opt_core.params import param_table
from opt_torch.activations import ACTIVATIONS
from opt_torch.generation.generate import LOOPS
from opt_torch.generation.processors import APPLY, process
from opt_torch.generation.state import DecodeState, StepOutput
from opt_torch.weights import canonical_arrays, find_parameter
from tests.backends.base import CPU_KERNELS, Array, Backend, canonical_shapes, nested, read_output


class TorchBackend(Backend):
    name = "torch"
    prefix = ""
    package = opt_torch
    kernels = CPU_KERNELS
    applied = frozenset(APPLY)

    def activation(self, name: str, x: Array) -> Array:
        return ACTIVATIONS[name](torch.from_numpy(x)).numpy()

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
        torch.manual_seed(seed)
        return self._class(architecture)(config, **options).eval()

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
        with torch.device("meta"):
            model = self._class(architecture)(config)
        leaves = {tuple(name.split(".")): p.shape for name, p in model.named_parameters()}
        architecture = model.architecture
        return canonical_shapes(param_table(config, architecture), "torch", architecture, leaves)

    def forward(
        self,
        model: Any,
        *,
        train: bool = False,
        seed: int = 0,
        compiled: bool = False,
        **inputs: Any,
    ) -> dict[str, Any]:
        torch.manual_seed(seed)
        model.train(train)
        try:
            with torch.set_grad_enabled(train):
                output = model(**{key: _tensor(value) for key, value in inputs.items()})
        finally:
            model.eval()
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
        torch.manual_seed(seed)
        model.train(train).zero_grad()
        model(**{name: _tensor(value) for name, value in inputs.items()}).loss.backward()
        model.eval()
        rows = param_table(model.config, model.architecture)
        owners = {p.name: find_parameter(model, p, model.architecture) for p in rows}
        found = {name: owner.get_parameter(leaf) for name, (owner, leaf) in owners.items()}
        for parameter in found.values():
            if parameter.grad is None:  # of a layer that was dropped
                parameter.grad = torch.zeros_like(parameter)
        return {name: parameter.grad.numpy() for name, parameter in found.items()}

    def init_cache(self, model: Any, batch_size: int, max_length: int) -> Any:
        return model.init_cache(batch_size, max_length)

    def generate(self, model: Any, input_ids: Array | None = None, **options: Any) -> Array:
        options = {key: _tensor(value) for key, value in options.items()}
        return model.generate(_tensor(input_ids), **options).numpy()

    def generate_output(
        self, model: Any, input_ids: Array | None = None, **options: Any
    ) -> dict[str, Any]:
        options = {key: _tensor(value) for key, value in options.items()}
        output = model.generate(_tensor(input_ids), return_dict_in_generate=True, **options)
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
        logits, rows = torch.from_numpy(table), torch.from_numpy(tokens)
        room = rows.new_full((len(rows), plan.max_new_tokens), plan.pad_token_id)
        buffer = torch.cat([rows, room], dim=1)
        state = DecodeState(
            tokens=buffer,
            mask=torch.ones_like(buffer),
            length=rows.shape[1],
            prompt_length=rows.shape[1],
            offset=0,
            limit=plan.max_new_tokens if limit is None else limit,
            finished=torch.zeros(len(rows), dtype=torch.bool),
            logits=logits[rows[:, -1]],
            cache=0,  # counts the steps
        )
        found = LOOPS[type(plan.strategy)](
            plan,
            state,
            lambda tokens, cache, rows=None: StepOutput(logits[tokens], None, cache + 1),
            None if noise is None else torch.from_numpy(noise).__getitem__,
            watch,
        )
        return found.tokens.numpy(), found.length, found.cache

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
            tokens=torch.from_numpy(tokens),
            mask=torch.from_numpy(mask),
            length=length,
            prompt_length=prompt_length,
            offset=offset,
            limit=tokens.shape[1] - prompt_length if limit is None else limit,
            finished=torch.zeros(len(tokens), dtype=torch.bool),
            logits=torch.from_numpy(scores),
            cache=None,
            unconditional=None if unconditional is None else torch.from_numpy(unconditional),
            chosen=None if chosen is None else torch.from_numpy(chosen),
        )
        return process(tuple(processors), state.logits, state).numpy()

    def _class(self, architecture: str) -> Any:
        return getattr(self.package, self.prefix + architecture)


def _tensor(value: Any) -> Any:
    """Arrays as tensors; all else as it is, also the pairs of past_key_values."""
    # A copy: the golden arrays are not to be written.
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


def _numpy(value: Any) -> Any:
    return nested(value, lambda t: (t.float() if t.is_floating_point() else t).detach().numpy())


BACKEND = TorchBackend()
