# SPDX-License-Identifier: Apache-2.0
"""The three backends by name: what each is called, and how the worker speaks to it.

Nothing here imports a framework; `load` does, inside the worker.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from opt_core.encodings import to_tensors


class Framework(StrEnum):
    """The values of `--framework`."""

    TORCH = "torch"
    TF = "tf"
    FLAX = "flax"


@dataclass(frozen=True)
class Backend:
    """One backend as data; `return_tensors` is the tokenizer's name for its arrays."""

    title: str
    package: str
    model_class: str
    modules: tuple[str, ...]  # what must be installed
    extra: str
    return_tensors: str

    def missing(self) -> str | None:
        """The first module that is not installed, or None."""
        return next((module for module in self.modules if find_spec(module) is None), None)

    def advice(self) -> str:
        """What to say where it is not installed."""
        return f"{self.title} is not installed: pip install 'opt-zoo[{self.extra}]'"


BACKENDS = {
    Framework.TORCH: Backend("PyTorch", "opt_torch", "OPTForCausalLM", ("torch",), "torch", "pt"),
    Framework.TF: Backend(
        "TensorFlow", "opt_tf", "TFOPTForCausalLM", ("tensorflow", "keras"), "tf", "tf"
    ),
    Framework.FLAX: Backend(
        "JAX/Flax", "opt_flax", "FlaxOPTForCausalLM", ("jax", "flax"), "flax", "jax"
    ),
}


class CausalLM:
    """A loaded model that takes and gives numpy arrays, whatever its framework."""

    def __init__(self, framework: Framework, model: Any) -> None:
        self.framework = framework
        self.model = model

    @staticmethod
    def model_class(framework: Framework) -> Any:
        """The model class, its framework imported; raises ImportError where it is not installed."""
        backend = BACKENDS[framework]
        return getattr(importlib.import_module(backend.package), backend.model_class)

    @classmethod
    def load(cls, framework: Framework, model: str, dtype: str | None) -> Self:
        """Loads a checkpoint in evaluation mode; raises OPTError.

        Args:
            dtype: of parameters and computation; None for float32.
        """
        options = {"dtype": dtype}
        if framework is Framework.FLAX:  # where `dtype` is the computation's alone
            options["param_dtype"] = dtype or "float32"
        return cls(framework, cls.model_class(framework).from_pretrained(model, **options))

    def logits(self, inputs: dict[str, Any]) -> NDArray[np.float32]:
        """[B, T] ids and mask -> [B, T, V]."""
        if self.framework is Framework.TORCH:
            import torch

            with torch.no_grad():
                return np.asarray(self.model(**self._tensors(inputs)).logits.float())
        return np.asarray(self.model(**self._tensors(inputs)).logits).astype(np.float32)

    def generate(self, inputs: dict[str, Any], options: dict[str, Any]) -> NDArray[np.int64]:
        """[B, T] ids and mask -> [B x num_return_sequences, T + new tokens]."""
        output = self.model.generate(**self._tensors(inputs), **options)
        if self.framework is Framework.FLAX:
            output = output.sequences
        return np.asarray(output).astype(np.int64)

    def _tensors(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return to_tensors(inputs, BACKENDS[self.framework].return_tensors)
