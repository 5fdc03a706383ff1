# SPDX-License-Identifier: Apache-2.0
"""Weights that stay in their files: which may be mapped, and a watch on those that are.

A mapped weight is a view on its file: nothing is read before it is touched, and what others write into
the file afterwards is in the model, or ends the process where they have cut it. So by default only files
of the hub's cache are mapped, which nobody rewrites, and all are looked at before each call.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import nn

from opt_core import CheckpointError, InputError
from opt_core.checkpoints.sources import MappedFile, NamedFile
from opt_core.dtypes import MODEL_DTYPES
from opt_core.files import in_hub_cache
from opt_core.loading import Source
from opt_core.pretrained import Pretrained


class Files:
    """The files that a model's weights lie in, or are read from as its modules run.

    A copy of the model has weights of its own: what is mapped is not copied along. The base model in
    a model shares its files: whoever calls either is told of all.
    """

    whole: weakref.ref[nn.Module] | None = None  # the model that was loaded

    def __init__(self, mapped: Sequence[MappedFile] = (), named: Sequence[NamedFile] = ()) -> None:
        self.mapped = tuple(mapped)
        self.named = tuple(named)

    def __deepcopy__(self, memo: object) -> Files:
        return Files(named=self.copied())

    def __reduce__(self) -> tuple[Any, ...]:
        return Files, ((), self.copied())

    def copied(self) -> tuple[NamedFile, ...]:
        """The files of a copy; raises CheckpointError if it would be one of other weights."""
        for mapped in self.mapped:
            mapped.check()
        return self.named

    def check(self, caller: nn.Module) -> None:
        """Raises CheckpointError if one of the files that the model still uses was written to."""
        if _CHECKED.get() is self:
            return
        whole = None if self.whole is None else self.whole()
        model = caller if whole is None else whole
        for mapped in self.mapped:
            try:
                mapped.check()
            except CheckpointError:
                if any(_lies_in(mapped, parameter) for parameter in model.parameters()):
                    raise
        for named in self.named:
            named.check()

    @contextmanager
    def checked(self, caller: nn.Module) -> Iterator[Self]:
        """Checks now, and not again within."""
        self.check(caller)
        token = _CHECKED.set(self)
        try:
            yield self
        finally:
            _CHECKED.reset(token)

    def hold(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a view on one of the files."""
        return any(file.holds(tensor.data_ptr()) for file in self.mapped)


NO_FILES = Files()
_CHECKED: ContextVar[Files] = ContextVar("_CHECKED", default=NO_FILES)


def is_mapped(source: Source, dtype: str) -> bool:
    """Whether a parameter's values lie in the file as PyTorch has them in memory."""
    tensor = source.tensor
    return tensor.maps and tensor.dtype == MODEL_DTYPES[dtype] and not source.turns_for("torch")


def decide(pretrained: Pretrained, mmap: bool | None) -> bool:
    """Whether to map what can be mapped.

    Args:
        mmap: None maps safetensors in the hub's cache.

    Raises:
        InputError: True, and a tensor that cannot be mapped; or another value.
    """
    if mmap not in (None, True, False):
        raise InputError(f"mmap: expected True, False or None, found {mmap!r}.")
    reader = pretrained.reader
    if mmap is None:
        return reader.container == "safetensors" and all(map(in_hub_cache, reader.files))
    if not mmap:
        return False
    others = [s.tensor for s in pretrained.sources.values() if not is_mapped(s, pretrained.dtype)]
    if others:
        raise InputError(
            f"mmap=True: expected every weight to lie in its file as PyTorch has it in memory "
            f"({pretrained.dtype}, [out, in]), found {len(others)} that do not, such as "
            f"{others[0].name} ({others[0].dtype}) in {reader.container} file "
            f"{others[0].info.file}. Load with dtype='auto', leave mmap out, or convert the checkpoint "
            "to safetensors first."
        )
    return True


def watch(model: Any, files: Files) -> None:
    """Has a model that was loaded look at its files before each call.

    In programs that are compiled, exported or recorded, nothing looks.
    """
    if not files.mapped and not files.named:
        return
    files.whole = weakref.ref(model)
    base = model if model.architecture == "OPTModel" else model.model
    for module in {model, base}:
        module._files = files
        module.register_state_dict_pre_hook(_check)
    base.register_forward_pre_hook(_check)  # by which every class of model runs


def _check(module: Any, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        module._files.check(module)


def _lies_in(file: MappedFile, tensor: torch.Tensor) -> bool:
    try:
        return file.holds(tensor.data_ptr())
    except RuntimeError:  # it stands for others, whose place it does not tell
        return True
