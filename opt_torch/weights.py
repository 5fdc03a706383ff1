# SPDX-License-Identifier: Apache-2.0
"""Between the parameter table and the modules: initial values, assigning, reading back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from opt_core import OPTConfig, UnsupportedError
from opt_core.checkpoints import LazyTensor
from opt_core.loading import Source
from opt_core.params import Kind, Param, param_table
from opt_core.saving import Added

INITIAL_VALUES: Mapping[Kind, Callable[[Tensor, float], Tensor]] = {
    Kind.LINEAR: lambda tensor, std: tensor.normal_(0.0, std),
    Kind.BIAS: lambda tensor, std: tensor.zero_(),
    Kind.EMBEDDING: lambda tensor, std: tensor.normal_(0.0, std),
    Kind.NORM_SCALE: lambda tensor, std: tensor.fill_(1.0),
    Kind.NORM_BIAS: lambda tensor, std: tensor.zero_(),
}


def find_parameter(model: nn.Module, param: Param, architecture: str) -> tuple[nn.Module, str]:
    """The module that owns the parameter, and the parameter's name there.

    Raises:
        UnsupportedError: the model has no such module any more.
    """
    *parents, leaf = param.path("torch", architecture)
    try:
        return model.get_submodule(".".join(parents)), leaf
    except AttributeError as error:
        raise UnsupportedError(
            f"{param.name}: expected {'.'.join(parents)} in the model, found none ({error}). Were layers "
            "cut or wrapped? Set config.num_hidden_layers to what is left, or put OPT's own layer back."
        ) from error


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


def added_tensors(model: nn.Module, config: OPTConfig, arch: str) -> dict[str, Tensor]:
    """What modules of the user's hold beyond the table, by name: parameters and saved buffers.

    Raises:
        UnsupportedError: a tensor inside a layer of the table, which changes what it computes.
    """
    table = param_table(config.replace(tie_word_embeddings=False), arch)
    own = {".".join(param.path("torch", arch)) for param in table}
    layers = {name.rpartition(".")[0] for name in own}
    state = model.state_dict(keep_vars=True)
    # The table's tensors under other names too: of what is compiled, or shares them.
    known = {id(tensor) for tensor in _table_tensors(model, table, arch)}
    added = {k: v for k, v in state.items() if k not in own and id(v) not in known}
    for name in added:
        parts = name.split(".")
        inside = next((i for i in range(len(parts)) if ".".join(parts[:i]) in layers), None)
        if inside is not None:
            raise UnsupportedError(
                f"{name}: expected no such tensor in {'.'.join(parts[:inside])}, for which an OPT "
                "checkpoint has no place: an adapter, a parametrization, or another layer than OPT's. "
                "Merge or remove it before saving (an adapter's own library can save it alone)."
            )
    return added


def _table_tensors(model: nn.Module, table: Iterable[Param], arch: str) -> Iterator[Any]:
    for param in table:
        module, leaf = find_parameter(model, param, arch)
        yield getattr(module, leaf, None)


def added_outgoing(model: nn.Module, config: OPTConfig, arch: str) -> Iterator[Added]:
    """These as `save_pretrained` writes them: under their own names.

    Raises:
        UnsupportedError: as `added_tensors` and `canonical_arrays`.
    """
    for name, tensor in added_tensors(model, config, arch).items():
        dtype = _stored_dtype(name, tensor)
        yield Added(name, dtype, tuple(tensor.shape), partial(to_numpy, tensor))


@torch.no_grad()
def assign_added(
    added: Mapping[str, Tensor], found: Mapping[str, LazyTensor], dtype: torch.dtype
) -> None:
    """Gives modules of the user's the checkpoint's values; what it lacks stays as it was made.

    Args:
        added: of `added_tensors`.
    """
    for name, tensor in added.items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
        if name in found:
            tensor.copy_(from_numpy(found[name].read()))


def follow(model: nn.Module, before: Mapping[str, nn.Parameter]) -> None:
    """Lets whatever shared a parameter that was replaced share the new one.

    Args:
        before: the parameters by all their names, before some were replaced.
    """
    now = {name: model.get_parameter(name) for name in before}
    replaced = {id(old): now[name] for name, old in before.items() if now[name] is not old}
    for name, old in before.items():
        if now[name] is old and id(old) in replaced:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_parameter(leaf, replaced[id(old)])


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether the two are one parameter, or two over the same memory."""
    plain = all(type(x) is nn.Parameter and not x.is_meta for x in (first, second))
    return first is second or (
        plain
        and (first.shape, first.stride()) == (second.shape, second.stride())
        and first.data_ptr() == second.data_ptr()
    )


def canonical_arrays(
    model: nn.Module, config: OPTConfig, arch: str
) -> Iterator[tuple[Param, np.dtype, Callable[[], np.ndarray]]]:
    """Each row of the table, its dtype in the model, and a function that reads its values.

    Raises:
        UnsupportedError: parameters without values in memory, or quantized.
    """
    for param in param_table(config, arch):
        module, leaf = find_parameter(model, param, arch)
        tensor = getattr(module, leaf, None)
        if not isinstance(tensor, Tensor):
            raise UnsupportedError(
                f"{param.name}: expected a tensor to save, found {type(module).__name__}, which has none "
                f"of that name, in the place of {param.module}. Put OPT's own layer back."
            )
        yield param, _stored_dtype(param.name, tensor), partial(to_numpy, tensor)


def _stored_dtype(name: str, tensor: Tensor) -> np.dtype:
    """The dtype in which a tensor of the model is saved; raises UnsupportedError if it cannot be."""
    if tensor.is_meta:
        raise UnsupportedError(
            f"{name} has no values in memory: it lies on disk, or none were loaded. To save the model, "
            "load it without device_map; opt-zoo convert needs little memory."
        )
    is_parameter = isinstance(tensor, nn.Parameter)
    if type(tensor) not in (nn.Parameter, Tensor) or (
        is_parameter and not tensor.is_floating_point()
    ):
        raise UnsupportedError(
            f"{name}: expected plain numbers to save, found {type(tensor).__name__} of "
            f"{tensor.dtype}: the model is quantized. Save the one that it was made from."
        )
    return to_numpy(torch.empty(0, dtype=tensor.dtype)).dtype
