# SPDX-License-Identifier: Apache-2.0
"""What the shared suite asks of a backend: numpy arrays and plain values in and out.

An adapter for one framework is a subclass of `Backend` and a module attribute `BACKEND`, an
instance of it. It translates arrays and calls, and neither skips nor repairs anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core import GenerationConfig, OPTConfig
from opt_core.generation.plan import DecodePlan
from opt_core.generation.processors import LogitsProcessor
from opt_core.params import Param

Array = NDArray[Any]
Model = Any  # a model of the framework

#: Outputs that are given as numpy arrays or lists of them.
OUTPUTS = ("loss", "logits", "last_hidden_state", "hidden_states", "attentions", "past_key_values")
#: Kernels of attention that need no accelerator.
CPU_KERNELS = ("eager", "sdpa")


class Backend(ABC):
    """One framework, seen through numpy.

    Numbers come back in float32 (16-bit formats exactly widened), except in `canonical_weights`,
    which keeps the model's own dtype (bfloat16 as ml_dtypes').
    """

    name: str  # as in --backend
    prefix: str  # of the public classes: "", "TF", "Flax"
    package: ModuleType
    #: Whether tests run what makes one program more of each case too: `--all-programs`.
    runs_all_programs: bool = False

    @property
    def names(self) -> frozenset[str]:
        """The public names of the package."""
        return frozenset(self.package.__all__)

    @property
    @abstractmethod
    def kernels(self) -> tuple[str, ...]:
        """The values of `attn_implementation`; "eager" is one of them."""

    @property
    @abstractmethod
    def applied(self) -> frozenset[type[LogitsProcessor]]:
        """The processors that `generation/processors.py` can apply."""

    @abstractmethod
    def activation(self, name: str, x: Array) -> Array:
        """An activation function on an array."""

    # --- models ------------------------------------------------------------------------------

    @abstractmethod
    def load(
        self, path: str | Path, *, architecture: str = "OPTForCausalLM", **options: Any
    ) -> Any:
        """`from_pretrained` of a class, by its name in PyTorch, with its options as they are.

        `dtype` and `torch_dtype` are that of the parameters and of the computation.
        """

    @abstractmethod
    def create(
        self,
        config: OPTConfig,
        seed: int = 0,
        *,
        architecture: str = "OPTForCausalLM",
        **options: Any,
    ) -> Model:
        """A model with initial values drawn from `seed`."""

    @abstractmethod
    def save(self, model: Model, path: Path, **options: Any) -> None:
        """`save_pretrained`."""

    @abstractmethod
    def config(self, model: Model) -> OPTConfig:
        """The model's configuration."""

    @abstractmethod
    def generation_config(self, model: Model) -> GenerationConfig:
        """The model's defaults for `generate`."""

    @abstractmethod
    def canonical_weights(self, model: Model) -> dict[str, Array]:
        """The parameters under canonical names and in canonical layout."""

    @abstractmethod
    def shapes(
        self, config: OPTConfig, *, architecture: str = "OPTForCausalLM"
    ) -> dict[str, tuple[int, ...]]:
        """The canonical names and shapes of a model's parameters, without memory for them.

        Taken from the framework's own modules, not from the table.
        """

    # --- calls -------------------------------------------------------------------------------

    @abstractmethod
    def forward(
        self,
        model: Model,
        *,
        train: bool = False,
        seed: int = 0,
        compiled: bool = False,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Calls the model with arrays, flags, and past_key_values as raw cache or numpy pairs.

        Args:
            train: in training mode, with dropout drawn from `seed`.
            compiled: as one program, where each operation of a call is otherwise compiled by itself
                (JAX, as under `jax.jit`); no values can be checked there. The others run as they are.

        Returns:
            What the model returned, by name: a numpy array, a list of them, or for
            past_key_values a list of pairs of [B, N, S, H]; and under "raw" the object itself. For
            return_dict=False, "tuple" holds the list of all values instead of their names.
        """

    @abstractmethod
    def gradients(
        self,
        model: Model,
        *,
        train: bool = False,
        seed: int = 0,
        compiled: bool = False,
        **inputs: Any,
    ) -> dict[str, Array]:
        """The gradient of the loss by canonical name, in canonical layout; the rest as `forward`."""

    @abstractmethod
    def init_cache(self, model: Model, batch_size: int, max_length: int) -> Any:
        """An empty fixed cache, to be passed as past_key_values."""

    @abstractmethod
    def generate(self, model: Model, input_ids: Array | None = None, **options: Any) -> Array:
        """`generate`; arrays among the options (attention_mask, noise) are translated."""

    @abstractmethod
    def generate_output(
        self, model: Model, input_ids: Array | None = None, **options: Any
    ) -> dict[str, Any]:
        """`generate` with `return_dict_in_generate`: what it returned by name, as from `forward`."""

    @abstractmethod
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
        """Runs the loop of the plan's strategy without a model: a compiled one where nobody watches.

        Args:
            tokens: [B, T] of the rows.
            table: [V, V], the logits that follow each token.
            limit: new tokens allowed, if fewer than the plan has room for.
            noise: [steps, B, V].
            watch: an object with `chose`.

        Returns:
            The new tokens [B, any], how many columns are filled, and the number of steps made.
        """

    @abstractmethod
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
        """The scores [B, V] after the processors, in a state of tokens and mask [B, S].

        The rest is as in a backend's DecodeState; `limit` is by default all the room there is. With
        `compiled`, the processors run as a loop compiles them, where the backend does so.
        """


def read_output(output: Any, to_numpy: Any) -> dict[str, Any]:
    """A model's output as `Backend.forward` returns it; `to_numpy` turns one value, nested or not."""
    if isinstance(output, Mapping):
        return {**{key: to_numpy(value) for key, value in output.items()}, "raw": output}
    return {"tuple": [to_numpy(value) for value in output], "raw": output}


def nested(value: Any, to_array: Any) -> Any:
    """Arrays in nested sequences as numpy, 16-bit floating-point ones widened to float32."""
    if isinstance(value, Sequence):
        return [nested(item, to_array) for item in value]
    array = np.asarray(to_array(value))
    narrow = array.dtype.itemsize == 2 and array.dtype.kind in "fV"  # V: ml_dtypes' bfloat16
    return array.astype(np.float32) if narrow else array


def canonical_shapes(
    table: Sequence[Param],
    framework: str,
    architecture: str,
    leaves: Mapping[tuple[str, ...], Sequence[int]],
) -> dict[str, tuple[int, ...]]:
    """The shapes of a framework's leaves under their canonical names and in canonical layout.

    A leaf that the table does not know keeps its own path, so that a comparison shows it.
    """
    rest, shapes = dict(leaves), {}
    for param in table:
        shape = rest.pop(param.path(framework, architecture), None)
        if shape is not None:
            shapes[param.name] = tuple(shape)[:: -1 if param.transposed(framework) else 1]
    return {**shapes, **{"/".join(path): tuple(shape) for path, shape in rest.items()}}
