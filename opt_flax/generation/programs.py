# SPDX-License-Identifier: Apache-2.0
"""What `generate` compiles: a program for each shape of its arguments, shared by models that compute alike.

Each is a `jax.jit` of its own, so that JAX forgets it when `opt_core.programs` does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields
from functools import partial, wraps
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from opt_core import OPTConfig
from opt_core.programs import Programs

Function = TypeVar("Function", bound=Callable[..., Any])


class ModulePrograms(Programs):
    """Those of a module and of all that compute the same."""


def programs_of(module: nn.Module) -> ModulePrograms:
    """The programs of a module; models keep them alive."""
    return _SHARED.setdefault(_computation(module), ModulePrograms())


_SHARED: WeakValueDictionary[Hashable, ModulePrograms] = WeakValueDictionary()
#: Of what runs no module.
_LOOSE = Programs()


def _computation(module: nn.Module) -> Hashable:
    """What a module computes; one that somebody has wrapped is like itself alone."""
    if not type(module).__module__.startswith("opt_flax."):
        return module
    own = (x.name for x in fields(module) if x.name not in ("config", "parent", "name"))
    config: OPTConfig = module.config
    return (type(module), config.computation, *(getattr(module, name) for name in own))


def run_compiled(module: nn.Module, function: Callable[..., Any], *key: Any) -> Callable[..., Any]:
    """`function`, whose first arguments are the module and the key, as a program of the others."""

    def run(*arguments: Any) -> Any:
        if within_program(arguments):
            return function(module, *key, *arguments)
        return programs_of(module).get(
            (function, key, _shapes(arguments[1:])),  # the first are the parameters
            lambda: jax.jit(partial(function, _fixed(module), *key)),
        )(*arguments)

    return run


def apart(function: Function) -> Function:
    """Lets a function of arrays and plans be a program of its own, where nothing around it is one."""

    @wraps(function)
    def run(*arguments: Any) -> Any:
        if within_program(arguments):
            return function(*arguments)
        key = (function, _shapes(arguments))
        return _LOOSE.get(key, lambda: jax.jit(partial(function)))(*arguments)

    return run  # type: ignore[return-value]


def within_program(values: Any) -> bool:
    """Whether any of the values is known only when the program around runs."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values))


def _fixed(module: nn.Module) -> nn.Module:
    """The module with a configuration that nobody changes."""
    if not type(module).__module__.startswith("opt_flax."):
        return module
    return module.clone(config=module.config.replace())


def _shapes(arguments: Any) -> Hashable:
    """What a program is compiled for."""
    leaves, tree = jax.tree.flatten(arguments)
    is_array = (Array, np.ndarray, np.generic)
    return tree, *((x.shape, x.dtype) if isinstance(x, is_array) else type(x) for x in leaves)
