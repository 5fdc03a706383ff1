# SPDX-License-Identifier: Apache-2.0
"""Linear weights laid out for decoding, which reads each of them once per token.

`prepare` gives every `Linear` of a model a `DecodingWeight` and frees its plain weight. Two kinds:
the same numbers in the order in which oneDNN reads them, or numbers rounded to eight or four bits. The
operations that these need carry no promise of PyTorch's: they are looked up in `private_operation`
alone, and wherever one is missing, or does not fit the call, `F.linear` takes its place.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt_core import InputError, UnsupportedError
from opt_torch.mapping import Files
from opt_torch.parts import DecodingWeight, Linear, is_readable


def private_operation(namespace: str, name: str) -> Callable[..., Tensor] | None:
    """An operation that PyTorch may change or drop; None where it has."""
    try:
        return getattr(getattr(torch.ops, namespace), name).default
    except AttributeError:
        return None


PACK = private_operation("mkldnn", "_reorder_linear_weight")
PACKED_LINEAR = private_operation("mkldnn", "_linear_pointwise")
INT8_LINEAR = private_operation("aten", "_weight_int8pack_mm")

#: What oneDNN packs -> the operation that tells whether this processor can; None where all can.
PACKABLE = {
    torch.float32: None,
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
#: The int8 operation reads the weight once for each row, in steps of this many columns.
INT8_MOST_ROWS = 8
INT8_COLUMNS = 32
#: The kernel for four bits: torchao calls it by a class that stands for tensors on a GPU alone. So many
#: columns share a scale.
INT4_DEVICES = ("cuda",)
INT4_GROUP = 128
#: From so many rows on, packed weights are taken without a trial (docs/performance.md: 1.3 times for 8).
MANY_ROWS = 4
#: For fewer: how many bytes of weights to multiply, and how often, to tell which layout is faster.
TRIAL_BYTES = 64 * 2**20
TRIALS = 5
#: Linux: give pages back without losing what is in them (include/uapi/asm-generic/mman-common.h).
_MADV_PAGEOUT = 21

Layout = Callable[[Tensor], DecodingWeight]


class PackedWeight:
    """The same numbers in blocks that suit the processor and the number of rows."""

    def __init__(self, weight: Tensor, batch_size: int) -> None:
        if PACK is None:
            raise UnsupportedError(
                "This build of PyTorch cannot pack the weights of linear layers."
            )
        self.packed = PACK(weight, batch_size)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if (
            torch.compiler.is_compiling()
        ):  # the compiler is there: as a decorator, this would load it
            untraced = torch.compiler.disable(self._multiply, reason="packed: call model.train()")
            return untraced(x, bias)
        return self._multiply(x, bias)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if PACKED_LINEAR is None or x.dtype != self.packed.dtype or not _is_plain_call(x):
            return F.linear(x, self.plain(), bias)
        return PACKED_LINEAR(x, self.packed, bias, "none", [], "")

    def plain(self) -> Tensor:
        return self.packed.to_dense()


class RoundedWeight:
    """Numbers rounded by torchao, which multiplies by them too."""

    name: ClassVar[str]
    rounded: Any  # a tensor of torchao

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.rounded, bias)

    def plain(self) -> Tensor:
        raise UnsupportedError(
            f'This model was prepared for decoding with weights="{self.name}": its weights are rounded '
            "for good. It runs under torch.no_grad(), and can be neither trained, moved, saved nor "
            "copied. For that, load the checkpoint again."
        )


class Int8Weight(RoundedWeight):
    """The numbers rounded to eight bits with one scale for each output.

    Few rows are multiplied in bfloat16 without unpacking the weight; many by torchao's own product.
    """

    name = "int8"

    def __init__(self, weight: Tensor) -> None:
        quantization = _torchao()
        granularity = quantization.PerRow()
        self.rounded = quantization.Int8Tensor.from_hp(weight, granularity=granularity)
        self.scale = self.rounded.scale.flatten().to(torch.bfloat16)  # [out]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        columns = x.shape[-1]
        fits = x.numel() <= INT8_MOST_ROWS * columns and columns % INT8_COLUMNS == 0
        if INT8_LINEAR is None or not fits or not _is_plain_call(x):
            return super().linear(x, bias)
        rows = x.reshape(-1, columns).to(torch.bfloat16)
        product = INT8_LINEAR(rows, self.rounded.qdata, self.scale).to(x.dtype)
        product = product.view(*x.shape[:-1], -1)
        return product if bias is None else product + bias


class Int4Weight(RoundedWeight):
    """The numbers rounded to four bits, with a scale and a shift for each `INT4_GROUP` of an output."""

    name = "int4"

    def __init__(self, weight: Tensor) -> None:
        layout = _torchao().Int4TilePackedTo4dTensor
        self.rounded = layout.from_hp(weight.to(torch.bfloat16), [1, INT4_GROUP])


ROUNDED = {"int8": Int8Weight, "int4": Int4Weight}


@torch.no_grad()
def prepare(model: Any, batch_size: int, weights: str | None) -> None:
    """Lays the weights out as `OPTPreTrainedModel.prepare_for_decoding` says."""
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1, found {batch_size}.")
    if weights not in (None, *ROUNDED):
        raise InputError(f"weights: expected None, 'int8' or 'int4', found {weights!r}.")
    restore(model)
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if weights is not None:
        heads = [model.get_output_embeddings()] if weights == "int4" else []
        chosen = [linear for linear in linears if all(linear is not head for head in heads)]
        _check_placed(weights, {linear.weight.device.type for linear in chosen})
        lay_out(chosen, tables, model._files, ROUNDED[weights])
    elif can_pack(linears) and packing_pays(linears, batch_size):
        lay_out(linears, tables, model._files, lambda weight: PackedWeight(weight, batch_size))


def _check_placed(weights: str, devices: set[str]) -> None:
    if "meta" in devices:
        raise UnsupportedError(
            f"weights={weights!r}: expected weights in memory, found some that lie on disk, or were "
            "never loaded. Load the model without device_map."
        )
    if weights == "int4" and not devices <= {*INT4_DEVICES}:
        raise UnsupportedError(
            f"weights='int4': expected weights on a CUDA device, found {', '.join(sorted(devices))}. "
            "Call model.to('cuda') first, or use weights='int8'."
        )


def lay_out(linears: Sequence[Linear], tables: set[int], files: Files, layout: Layout) -> None:
    """Lays out one weight after the other, and frees it unless an embedding reads it too."""
    for linear in linears:
        plain = linear.weight.data
        linear.decoding_weight = layout(plain)
        if id(linear.weight) not in tables:
            linear.weight.data = plain.new_empty(0)
        if files.hold(plain):
            _release_pages(plain)


def restore(model: nn.Module) -> None:
    """Gives every linear layer its plain weight again."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.restore()


def can_pack(linears: Sequence[Linear]) -> bool:
    """Whether all weights are plain tensors of a kind that this processor packs."""
    if PACK is None or PACKED_LINEAR is None or not torch.backends.mkldnn.is_available():
        return False
    weights = [linear.weight for linear in linears]
    plain = all(type(w) is nn.Parameter and w.device.type == "cpu" and w.numel() for w in weights)
    return plain and all(_packs(dtype) for dtype in {weight.dtype for weight in weights})


def _packs(dtype: torch.dtype) -> bool:
    question = PACKABLE.get(dtype)
    if question is None:
        return dtype in PACKABLE
    supported = private_operation("mkldnn", question)
    return supported is not None and bool(supported())


def packing_pays(linears: Sequence[Linear], batch_size: int) -> bool:
    """Whether packed weights are faster, by a trial of the first layers where rows are few.

    With one row, Intel's library is ahead by a tenth on Intel's processors, and far behind on others.
    """
    if batch_size >= MANY_ROWS:
        return True
    plain: list[Callable[[Tensor], Tensor]] = []
    packed: list[Callable[[Tensor], Tensor]] = []
    inputs: list[Tensor] = []
    size = 0
    for linear in linears:
        weight = linear.weight.detach()
        inputs.append(weight.new_ones(batch_size, linear.in_features))
        plain.append(partial(F.linear, weight=weight, bias=linear.bias))
        packed.append(partial(PackedWeight(weight, batch_size).linear, bias=linear.bias))
        size += weight.nbytes
        if size >= TRIAL_BYTES:
            break
    times = [(_seconds(plain, inputs), _seconds(packed, inputs)) for _ in range(TRIALS)]
    best_plain, best_packed = map(min, zip(*times, strict=True))
    return best_packed < best_plain


def _seconds(products: Sequence[Callable[[Tensor], Tensor]], inputs: Sequence[Tensor]) -> float:
    start = time.perf_counter()
    for product, x in zip(products, inputs, strict=True):
        product(x)
    return time.perf_counter() - start


def _is_plain_call(x: Tensor) -> bool:
    """Whether an operation without gradient, tracing and casting rules of its own may run."""
    recorded = torch.is_grad_enabled() and x.requires_grad
    return is_readable(x) and not recorded and not torch.is_autocast_enabled("cpu")


def _release_pages(tensor: Tensor) -> None:
    """Tells Linux that a view on a file is not needed soon; otherwise the file stays in memory too."""
    if sys.platform != "linux":
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


def _torchao() -> ModuleType:
    try:
        from torchao import quantization
    except ImportError as error:
        raise UnsupportedError(
            "Rounded weights need torchao: pip install 'opt-zoo[int8]'."
        ) from error
    return quantization
