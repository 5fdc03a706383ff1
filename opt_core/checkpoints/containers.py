# SPDX-License-Identifier: Apache-2.0
"""Every kind of file that can be read, told by its content: a name proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from opt_core.checkpoints import (
    hdf5_format,
    msgpack_format,
    safetensors_format,
    torch_format,
)
from opt_core.checkpoints.sources import FileSource
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.errors import FormatError

Contents = tuple[list[LazyTensor], dict[str, str]]


@dataclass(frozen=True)
class Container:
    """A kind of file: how to tell it from its first 512 bytes, and how to read it.

    `read` returns the tensors and what the file says of itself.
    """

    name: str
    matches: Callable[[bytes], bool]
    read: Callable[[FileSource], Contents]


CONTAINERS = (
    Container("safetensors", safetensors_format.matches, safetensors_format.read_safetensors),
    Container("torch", torch_format.matches, torch_format.read_torch),
    Container("hdf5", hdf5_format.matches, hdf5_format.read_hdf5),
    Container("msgpack", msgpack_format.matches, msgpack_format.read_msgpack),
)


def recognise(source: FileSource) -> Container:
    """Tell a file's container; raises FormatError if it is of no known kind."""
    head = source.read_bytes(0, 512)
    for container in CONTAINERS:
        if container.matches(head):
            return container
    if head.startswith(b"version https://git-lfs"):
        raise FormatError(
            f"{source.path}: expected weights, found a Git LFS pointer: the repository was cloned "
            "without its large files. Run `git lfs pull` there, or use the hub name."
        )
    kinds = " or ".join(container.name for container in CONTAINERS)
    raise FormatError(
        f"{source.path}: expected {kinds}, found {source.size} bytes that begin with {head[:16]!r}"
        ". The file is damaged, its download incomplete, or it is something else: fetch it again."
    )
