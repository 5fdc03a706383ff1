# SPDX-License-Identifier: Apache-2.0
"""The flash_attn package on a CPU: its Triton kernels, run by Triton's interpreter.

They are the same algorithm behind the same Python functions as the CUDA kernels. Float32 and float16 are
computed rightly; bfloat16 is not, and the seed of dropout is constant.
"""

from __future__ import annotations

import contextlib
import os
import types
import warnings
from types import ModuleType

import torch

#: What `make test-flash` says: Triton and the package read it when they are imported.
VARIABLES = {"TRITON_INTERPRET": "1", "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE"}
ASKED = VARIABLES.items() <= os.environ.items()
#: What the package registers for CUDA alone, though its Triton kernels ask for no device.
OPERATIONS = (
    "_flash_attn_forward",
    "_flash_attn_varlen_forward",
    "_flash_attn_backward",
    "_flash_attn_varlen_backward",
)


class Driver:
    """What the package asks of a driver: a target with matrix cores, one device, no benchmark."""

    def get_current_target(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(backend="hip", arch="gfx942", warp_size=64)

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.zeros(1)

    def get_benchmarker(self) -> object:
        return lambda *arguments, **options: [0, 0, 0]

    def clear_cache(self, cache: object) -> None:
        pass


def interpreted() -> ModuleType:
    """The package's interface, to be called with tensors on the CPU; once per process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from triton.runtime import driver

        driver.set_active(Driver())
        torch.cuda.device = lambda device: contextlib.nullcontext()
        from flash_attn import flash_attn_interface as interface
    for name in OPERATIONS:
        operation = getattr(interface, name)
        torch.library.register_kernel(operation, "cpu", operation._init_fn)
    return interface
