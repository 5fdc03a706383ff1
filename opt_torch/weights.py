# SPDX-License-Identifier: Apache-2.0
"""Between the parameter table and the modules: initial values, assigning, reading back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from opt_core import OPTConfig, UnsupportedError
from opt_core.loading import Source
from opt_core.params import Kind, Param, param_table

INITIAL_VALUES: Mapping[Kind, Callable[[Tensor, float], Tensor]] = {
    Kind.LINEAR: lambda tensor, std: tensor.normal_(0.0, std),
    Kind.BIAS: lambda tensor, std: tensor.zero_(),
    Kind.EMBEDDING: lambda tensor, std: tensor.normal_(0.0, std),
    Kind.NORM_SCALE: lambda tensor, std: tensor.fill_(1.0),
    Kind.NORM_BIAS: lambda tensor, std: tensor.zero_(),
}


def find_parameter(model: nn.Module, param: Param, architecture: str) -> tuple[nn.Module, str]:
    """The module that owns the parameter, and the parameter's name there."""
    *parents, leaf = param.path("torch", architecture)
    return model.get_submodule(".".join(parents)), leaf


@torch.no_grad()
def initialize(model: nn.Module, config: OPTConfig, params: tuple[Param, ...], arch: str) -> None:
    """Draws N(0, init_std) for matrices, zeros biases and the pad row, sets norms to one.

    `modeling_opt.py:626-635` of the reference.
    """
    for param in params:
        module, leaf = find_parameter(model, param, arch)
        tensor = module.get_parameter(leaf)
        if tensor.is_meta:  # a model without values, or not yet
            continue
        INITIAL_VALUES[param.spec.kind](tensor, config.init_std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            tensor[module.padding_idx].zero_()


def assign(
    model: nn.Module,
    config: OPTConfig,
    arch: str,
    sources: Mapping[str, Source],
    dtype: torch.dtype,
    mapped: bool = False,
) -> None:
    """Replaces the parameters of a model on the meta device by the checkpoint's, one at a time.

    With `mapped`, a tensor that the file holds in `dtype` becomes a view on the file: its pages are
    read when they are first touched, and copied when they are first written.
    """
    for param in param_table(config, arch):
        assign_one(model, config, arch, param, sources.get(param.name), dtype, mapped)


def assign_one(
    model: nn.Module,
    config: OPTConfig,
    arch: str,
    param: Param,
    source: Source | None,
    dtype: torch.dtype,
    mapped: bool,
) -> None:
    """Replaces one parameter by the checkpoint's, or by initial values where there is none."""
    module, leaf = find_parameter(model, param, arch)
    if source is not None:
        tensor = to_tensor(source, dtype, mapped)
    else:
        tensor = torch.empty(param.shape, dtype=dtype, device="cpu")
    module.register_parameter(leaf, nn.Parameter(tensor))
    if source is None:
        initialize(model, config, (param,), arch)


@torch.no_grad()
def resized(weight: Tensor, size: int, std: float) -> nn.Parameter:
    """[V, E] -> [size, E]: the first rows, then as many as are missing, drawn anew."""
    rows = weight.new_empty(size, weight.shape[1]).normal_(0.0, std)
    kept = min(size, len(weight))
    rows[:kept] = weight[:kept]
    return nn.Parameter(rows, requires_grad=weight.requires_grad)


def to_tensor(source: Source, dtype: torch.dtype, mapped: bool) -> Tensor:
    """The parameter in `dtype`; with `mapped` a view on the file where that is the file's own."""
    stored = from_numpy(np.empty(0, source.tensor.dtype)).dtype
    in_place = mapped and stored == dtype
    return from_numpy(source.map("torch") if in_place else source.read("torch")).to(dtype)


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor over the array's memory; bfloat16 passes as its bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The inverse of `from_numpy`, from any device."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def canonical_arrays(
    model: nn.Module, config: OPTConfig, arch: str
) -> Iterator[tuple[Param, np.dtype, Callable[[], np.ndarray]]]:
    """Each row of the table, its dtype in the model, and a function that reads its values.

    Raises:
        UnsupportedError: parameters without values in memory, or quantized.
    """
    for param in param_table(config, arch):
        module, leaf = find_parameter(model, param, arch)
        tensor = module.get_parameter(leaf)
        if tensor.is_meta:
            raise UnsupportedError(
                f"{param.name} has no values in memory: it lies on disk, or none were loaded. To save "
                "the model, load it without device_map; opt-zoo convert needs little memory."
            )
        if type(tensor) is not nn.Parameter or not tensor.is_floating_point():
            raise UnsupportedError(
                f"{param.name}: expected plain numbers to save, found {type(tensor).__name__} of "
                f"{tensor.dtype}: the model is quantized. Save the one that it was made from."
            )
        dtype = to_numpy(torch.empty(0, dtype=tensor.dtype)).dtype
        yield param, dtype, partial(to_numpy, tensor)
