# SPDX-License-Identifier: Apache-2.0
"""A second device without hardware: tensors that say `pretend:0`, and compute on the CPU.

They are plain tensors and parameters, as on a GPU: what lies on the device is told by its memory. Where
CUDA would raise an error, this raises one: operations that mix devices, `.numpy()`. And it counts how
often the host waits: for values that it reads, for copies that it sends, for sizes that depend on values.

What it cannot do: autocast, graphs, streams, and kernels of the device's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # which a mode of the dispatcher loads: not amid what is changed here
from torch import Tensor
from torch.autograd import Function
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretend"
torch.utils.rename_privateuse1_backend(NAME)
DEVICE = torch.device(NAME, 0)
CPU = torch.device("cpu")

aten = torch.ops.aten
#: Take indices from the CPU too.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXING |= {aten._index_put_impl_.default, aten._unsafe_index.Tensor}
#: The host must know what comes out, or how much.
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

#: What PyTorch asks of `torch.pretend`: it is not available but while it is pretended, or compilers
#: would reckon with it. Its generator is the CPU's own.
MODULE = SimpleNamespace(
    _lazy_init=lambda: None,
    is_available=lambda: False,
    _is_in_bad_fork=lambda: False,
    manual_seed_all=lambda seed: None,
    get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
)
torch._register_device_module(NAME, MODULE)

PlainGenerator = torch.Generator


def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's own, which asks nobody: a mode would send it to what stands in for it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return call


def leaves_of(value: Any) -> list[Any]:
    """What is in it, however deep."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in leaves_of(part)]
    return [value]


device_of = plainly(torch._C.TensorBase.device.__get__)
storage_of = plainly(Tensor.untyped_storage)
layout_of = plainly(torch._C.TensorBase.layout.__get__)


class Pretence(TorchDispatchMode):
    """The device, while it is entered.

    Attributes:
        reads: how often the host waited for values of the device.
        sends: how often it waited until values of its own were there: not if they were sent with
            `non_blocking=True`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.sends = 0
        self.within_call = False  # of PyTorch's, with tensors of the device
        self._silent = False
        #: By address, which is given to no other as long as the reference lives.
        self._memory: dict[int, StorageWeakRef] = {}

    @property
    def waits(self) -> int:
        return self.reads + self.sends

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the device."""
        if layout_of(tensor) is not torch.strided or device_of(tensor).type != "cpu":
            return False
        return storage_of(tensor)._cdata in self._memory

    def keep(self, value: Any) -> Any:
        """From now on all of these tensors' memory is the device's."""
        for tensor in leaves_of(value):
            if isinstance(tensor, Tensor) and device_of(tensor).type == "cpu":
                storage = storage_of(tensor)
                self._memory[storage._cdata] = StorageWeakRef(storage)
        return value

    def copied(self, tensor: Tensor, here: bool, waits: bool = True) -> Tensor:
        """A tensor on the device, or on the CPU; reading always waits."""
        self._silent = True
        try:
            copy = tensor.detach().clone()
        finally:
            self._silent = False
        self.sends, self.reads = self.sends + (here and waits), self.reads + (not here)
        return self.keep(copy) if here else copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._silent:
            return func(*args, **kwargs)
        tensors = [x for x in leaves_of([args, kwargs]) if isinstance(x, Tensor)]
        ours = [x for x in tensors if self.holds(x)]
        asked = torch.device(kwargs.get("device") or CPU)
        if asked.type == NAME:
            kwargs["device"] = CPU
        here = asked.type == NAME or bool(ours) or (self.within_call and asked == CPU)
        if ours:
            self._check(func, args, tensors)
            self.reads += self._waits(func, args)
        if func is aten.copy_.default and self.holds(args[0]) != self.holds(args[1]):
            self.sends += self.holds(args[0])
            return func(*args, **kwargs)
        return self.keep(func(*args, **kwargs)) if here else func(*args, **kwargs)

    def _check(self, func: Any, args: Any, tensors: list[Tensor]) -> None:
        """As TensorIterator: numbers may come from the CPU, and nothing else."""
        others = [x for x in tensors if x.dim() and not self.holds(x)]
        if not others or func is aten.copy_.default:
            return
        if func in INDEXING and self.holds(args[0]):
            self.sends += 1
            return
        raise RuntimeError(
            f"{func}: expected all tensors on one device, found {DEVICE} "
            f"{[tuple(x.shape) for x in tensors if self.holds(x)]} and others "
            f"{[(str(device_of(x)), tuple(x.shape)) for x in others]}"
        )

    def _waits(self, func: Any, args: Any) -> bool:
        if func in INDEXING:
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            fills = len(args) > 2 and args[2].numel() == 1  # which is masked_fill
            return bool(masks) and not fills
        if func is aten.copy_.default:
            return not self.holds(args[0])
        return not WAITING.isdisjoint(func.tags)


class Calls(TorchFunctionMode):
    """Marks the calls of PyTorch with tensors of the device: what they make in passing lies there too."""

    def __init__(self, pretence: Pretence) -> None:
        super().__init__()
        self.pretence = pretence

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pretence, before = self.pretence, self.pretence.within_call
        kwargs = kwargs or {}
        leaves = leaves_of([args, kwargs])
        here = any(isinstance(x, Tensor) and pretence.holds(x) for x in leaves)
        here_too = here or torch.device(kwargs.get("device") or CPU).type == NAME
        for leaf in leaves:
            if isinstance(leaf, PlainGenerator) and isinstance(leaf, Generator) != here_too:
                raise RuntimeError(f"{func}: expected a generator of the device that it draws on")
        pretence.within_call = before or here
        try:
            return func(*args, **kwargs)
        finally:
            pretence.within_call = before


class Move(Function):
    """A copy on the other device; gradients go back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, pretence: Pretence, here: bool, waits: bool) -> Tensor:
        ctx.pretence, ctx.here = pretence, here
        return pretence.copied(tensor, here, waits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.pretence.copied(gradient, not ctx.here), None, None, None


class Generator(torch.Generator):
    """One of the device draws as the CPU's does."""

    def __new__(cls, device: Any = "cpu") -> Any:
        of_the_device = torch.device(device).type == NAME
        return super().__new__(cls, "cpu") if of_the_device else PlainGenerator(device)


#: Attributes that stand in for PyTorch's own, which ask a device beneath the dispatcher.
Changes = dict[tuple[Any, str], Any]


def _mover(pretence: Pretence) -> Callable[..., Tensor]:
    """`Tensor.to`."""
    to = plainly(Tensor.to)

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for given in args:
            if isinstance(given, Tensor):
                kwargs |= {"device": given.device, "dtype": given.dtype}
            elif isinstance(given, torch.dtype):
                kwargs["dtype"] = given
            elif isinstance(given, str | torch.device):
                kwargs["device"] = given
            elif isinstance(given, bool):  # the first of two, and nobody here gives the other
                kwargs["non_blocking"] = given
        found, kind = self, torch.device(kwargs.pop("device", None) or self.device).type
        if {self.device.type, kind} == {"cpu", NAME}:
            waits = not kwargs.pop("non_blocking", False)
            found = Move.apply(self, pretence, kind == NAME, waits)
        elif kind != self.device.type:
            kwargs["device"] = kind
        return to(found, **kwargs) if kwargs else found

    return moved


def _methods(pretence: Pretence) -> Changes:
    """Those of tensors."""
    moved, deepcopy = _mover(pretence), plainly(Tensor.__deepcopy__)
    tolist, numpy, array = map(plainly, (Tensor.tolist, Tensor.numpy, Tensor.__array__))

    def on_the_host(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if pretence.holds(self):
                raise TypeError(
                    f"can't convert {DEVICE} device type tensor to numpy: use Tensor.cpu()"
                )
            return method(self, *args, **kwargs)

        return call

    def copied(self: Tensor, memo: Any) -> Any:
        copy = deepcopy(self, memo)
        return pretence.keep(copy) if pretence.holds(self) else copy

    def at(name: str, here: Any) -> property:
        plain = plainly(getattr(torch._C.TensorBase, name).__get__)
        return property(lambda self: here if pretence.holds(self) else plain(self))

    return {
        (Tensor, "device"): at("device", DEVICE),
        (Tensor, "is_cpu"): at("is_cpu", False),
        (Tensor, "to"): moved,
        (Tensor, "cpu"): lambda self: moved(self, "cpu"),
        (Tensor, "tolist"): lambda self: tolist(moved(self, "cpu")),
        (Tensor, "numpy"): on_the_host(numpy),
        (Tensor, "__array__"): on_the_host(array),
        (Tensor, "__deepcopy__"): copied,
        (Tensor, "backward"): torch.autograd.backward,  # no call: it runs the model's code too
    }


def _functions() -> Changes:
    """Those that make tensors."""
    tensor, as_tensor = map(plainly, (torch.tensor, torch.as_tensor))
    groups = torch._C._group_tensors_by_device_and_dtype

    def new(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = tensor(data, **options)
        return made if device is None else made.to(device)

    def as_new(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        made = data if isinstance(data, Tensor) else as_tensor(data)
        return made.to(device or made.device, dtype)

    def grouped(lists: Any, with_indices: bool = False) -> Any:
        found = groups(lists, with_indices)  # by device and dtype
        return {(v[0][0][0].device, dtype): v for (_, dtype), v in found.items()}

    return {
        (torch, "tensor"): new,
        (torch, "as_tensor"): as_new,
        (torch, "Generator"): Generator,
        (torch._C, "_group_tensors_by_device_and_dtype"): grouped,
    }


@contextmanager
def pretended() -> Iterator[Pretence]:
    """A machine with the device, within this block."""
    pretence = Pretence()
    with ExitStack() as stack:
        stack.enter_context(patch.object(MODULE, "is_available", lambda: True))
        for (owner, name), value in {**_methods(pretence), **_functions()}.items():
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(Calls(pretence))
        stack.enter_context(pretence)
        yield pretence
