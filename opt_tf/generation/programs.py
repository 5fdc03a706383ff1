# SPDX-License-Identifier: Apache-2.0
"""What `generate` compiles: a program for each shape of its arguments, kept by its model.

TensorFlow keeps XLA's programs for the life of the process, also those whose function is gone; it can
only forget all at once, and then compiles anew what is called again. So that is done when more of them
are of no use than are in use. What it also keeps, of each function that XLA has compiled once, is its graph
with the place in Python of every operation: megabytes, which nothing frees. So no function is traced twice.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any
from weakref import WeakSet

import tensorflow as tf
from tensorflow.core.framework.resource_handle_pb2 import ResourceHandleProto
from tensorflow.core.framework.tensor_pb2 import TensorProto

from opt_core.programs import Programs, program_limit

#: TensorFlow's resource that holds XLA's programs, one for each device, and its type's name in C++'s ABI.
COMPILER = "xla_device_compiler"
COMPILER_TYPE = "N10tensorflow14DeviceCompilerIN3xla15LocalExecutableENS1_11LocalClientEEE"


class ModelPrograms(Programs):
    """Those of a model, and the functions of those that were freed, which are not traced again."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: dict[tuple[Hashable, bool], Any] = {}

    def clear(self) -> None:
        super().clear()
        self.functions.clear()
        XLA.collect(1)


class Program:
    """A function that is compiled when it is first called, by XLA unless that has no room."""

    def __init__(
        self, key: Hashable, function: Callable[..., Any], traced: dict[tuple[Hashable, bool], Any]
    ) -> None:
        place = (key, XLA.admit(self))
        if place not in traced:
            traced[place] = tf.function(function, jit_compile=place[1], autograph=False)
        self.function = traced[place]

    def __call__(self, *arguments: Any) -> Any:
        with XLA:
            return self.function(*arguments)


class _XLA:
    """How many programs XLA has, and how many are in use; as a context, that one runs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.alive: WeakSet[Program] = WeakSet()
        self.total = 0  # those that are of no use among them
        self.running = 0

    def __enter__(self) -> None:
        with self.lock:
            self.running += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.running -= 1

    def admit(self, program: Program) -> bool:
        """Counts a program; whether XLA may compile it."""
        is_full = self.total >= 2 * program_limit()
        self.collect(1 if is_full else len(self.alive) + 1)
        if self.total >= 2 * program_limit():
            warnings.warn(
                f"TensorFlow holds {self.total} compiled programs and cannot be made to forget those "
                "of no use any more, so new ones run without XLA: slower, the same tokens but for "
                "rounding. A new process has room again, or set_program_limit().",
                stacklevel=2,
            )
            return False
        self.alive.add(program)
        self.total += 1
        return True

    def collect(self, least: int) -> None:
        """Lets XLA forget all programs, if so many are of no use and none is running."""
        with self.lock:
            useful = len(self.alive)
            if self.total - useful < least or self.running or _others_compute():
                return
            if _forget():
                self.total = useful


XLA = _XLA()


def _others_compute() -> bool:
    """Whether another thread is inside of TensorFlow, where it may run a program."""
    for thread, frame in sys._current_frames().items():
        while frame is not None and thread != threading.get_ident():
            if frame.f_globals.get("__name__", "").startswith("tensorflow."):
                return True
            frame = frame.f_back  # type: ignore[assignment]
    return False


def _forget() -> bool:
    """Deletes XLA's programs of the device that models run on; False where nothing has their name."""
    low, rest = (int(tf.strings.to_hash_bucket(COMPILER_TYPE, n)) for n in (2**62, 2**63 - 1))
    codes = range(rest, 2**64, 2**63 - 1)  # of the type, known modulo these two
    device = tf.zeros(()).device
    handle = ResourceHandleProto(
        device=device,
        container="localhost",
        name=COMPILER,
        hash_code=next(code for code in codes if code % 2**62 == low),
        maybe_type_name=COMPILER_TYPE,
    )
    proto = TensorProto(dtype=tf.resource.as_datatype_enum, resource_handle_val=[handle])
    proto.tensor_shape.SetInParent()
    resource = tf.io.parse_tensor(proto.SerializeToString(), tf.resource)
    try:
        with tf.device(device):
            tf.raw_ops.DestroyResourceOp(resource=resource, ignore_lookup_error=False)
    except tf.errors.NotFoundError:
        return False
    return True


def run_compiled(model: Any, function: Callable[..., Any], *key: Any) -> Callable[..., Any]:
    """`function`, whose first arguments are the model and the key, as a program of the others."""

    def run(*arguments: Any) -> Any:
        if not tf.executing_eagerly():
            return function(model, *key, *arguments)
        # LoRA and quantization add variables.
        place = (function, key, len(model.variables), _shapes(arguments))
        programs = model.programs
        program = programs.get(
            place, lambda: Program(place, partial(function, model, *key), programs.functions)
        )
        return program(*arguments)

    return run


def _shapes(arguments: Any) -> Hashable:
    """What a program is compiled for."""
    leaves = tf.nest.flatten(arguments)
    return tuple((x.dtype, *x.shape) if tf.is_tensor(x) else x for x in leaves)
