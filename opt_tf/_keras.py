# SPDX-License-Identifier: Apache-2.0
"""Imports Keras 3 on its TensorFlow backend, or says what stands in the way."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

from opt_core import UnsupportedError

_BACKEND = "KERAS_BACKEND"


def import_keras() -> ModuleType:
    """Keras, running on TensorFlow; the environment is left as it was.

    The backend is fixed by the first import of Keras in a process, and importing TensorFlow imports
    Keras too.

    Raises:
        ImportError: no TensorFlow, another Keras, or Keras on another backend.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError("opt_tf needs TensorFlow: pip install 'opt-zoo[tf]' (or [tf-cpu]).")
    wanted = os.environ.get(_BACKEND)
    if "keras" not in sys.modules:
        if wanted not in (None, "", "tensorflow"):
            raise ImportError(
                f"opt_tf runs Keras 3 on TensorFlow, but {_BACKEND}={wanted!r}. Unset it, or set "
                f"{_BACKEND}=tensorflow, before Python starts."
            )
        os.environ[_BACKEND] = "tensorflow"  # outranks ~/.keras/keras.json
    try:
        import keras
    finally:
        if wanted is None:
            os.environ.pop(_BACKEND, None)
        else:
            os.environ[_BACKEND] = wanted
    if int(keras.version().split(".")[0]) < 3:
        raise ImportError(
            f"opt_tf needs Keras 3, found {keras.version()}: pip install --upgrade keras."
        )
    if keras.config.backend() != "tensorflow":
        raise ImportError(
            "opt_tf runs Keras 3 on TensorFlow, but keras was already imported on its "
            f"{keras.config.backend()!r} backend. Set {_BACKEND}=tensorflow before Python starts, or "
            "import opt_tf before keras."
        )
    return keras


def replace_layer(owner: Any, name: str, layer: Any) -> None:
    """Puts a layer, or None, in the place `name` of a built layer, where its variables count as before.

    Keras locks a built layer and has no public way to change it.

    Raises:
        UnsupportedError: a version of Keras that keeps its layers in another way.
    """
    old = getattr(owner, name)
    try:
        tracker = owner._tracker
        tracker.unlock()
        if old is not None and layer is not None:
            tracker.replace_tracked_value("layers", old, layer)
        elif old is not None:
            tracker.untrack(old)
        if layer is None:
            delattr(owner, name)  # which TensorFlow's checkpoints forget then, too
        setattr(owner, name, layer)
        tracker.lock()
    except AttributeError as error:
        raise UnsupportedError(
            f"Keras {import_keras().version()} lets no layer of a built model be replaced ({error}). "
            "Make a model of the configuration wanted, and copy the weights with set_weights."
        ) from error


import_keras()
