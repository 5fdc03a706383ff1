# SPDX-License-Identifier: Apache-2.0
"""Models larger than memory: each module on a device or on disk, brought in by accelerate as it runs."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from opt_core import InputError, UnsupportedError
from opt_core.checkpoints import CheckpointReader, LazyTensor
from opt_core.checkpoints.sources import NamedFile
from opt_core.dtypes import MODEL_DTYPES
from opt_core.formats import DEFAULT_FORMAT, FORMATS
from opt_core.loading import Source
from opt_core.params import EMBEDDING_NAME, TIED_HEAD_NAME, param_table
from opt_core.pretrained import Pretrained
from opt_core.saving import Outgoing, write_weights
from opt_core.validation import did_you_mean
from opt_torch.weights import assign_one, find_parameter, to_numpy

Device = str | int | torch.device
DeviceMap = Mapping[str, Device]
MaxMemory = Mapping[int | str, int | str]

#: What accelerate distributes by itself.
PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
#: A layer adds what it computes to what it was given, so all of it stays in one place.
UNDIVIDED = ["OPTDecoderLayer"]
#: Holds values, and computes nothing where another device can.
STORES = frozenset({"cpu", "disk"})


def place(
    model: Any,
    pretrained: Pretrained,
    device_map: Device | DeviceMap,
    max_memory: MaxMemory | None,
    folder: str | os.PathLike[str] | None,
    mapped: bool,
) -> list[NamedFile]:
    """Fills a model on the meta device, each module where `device_map` says, tensor by tensor.

    What lies on disk is read whenever its module runs: from the checkpoint itself if that is a file of
    safetensors in the dtype to load, else from files in `folder`, which go with the model. So it is,
    from the CPU, with what lies there while an accelerator computes. Such a model is frozen: gradients
    would be those of passing copies.

    Returns:
        The files that are read by their names as modules run.

    Raises:
        InputError: names that the model does not have, modules left out, named twice or on no device,
            a tied head away from its embeddings, `folder` missing.
        UnsupportedError: accelerate is missing, or several devices are to compute.
    """
    accelerate = _accelerate()
    model.to(getattr(torch, pretrained.dtype))  # the dtype that accelerate measures and restores
    mapping = _as_mapping(accelerate, model, device_map, max_memory)
    places = _places(model, mapping)
    main = _main_device({*places.values()})
    on_disk: dict[str, Source] = {}
    for param in param_table(model.config, model.architecture):
        name = ".".join(param.path("torch", model.architecture))
        source, where = pretrained.sources.get(param.name), places[name]
        if source is not None and where == "disk":
            on_disk[name] = source
            continue
        assign_one(model, model.config, model.architecture, param, source, model.dtype, mapped)
        module, leaf = find_parameter(model, param, model.architecture)
        values = module.get_parameter(leaf).detach()
        if where == "disk":  # initial values, which the checkpoint does not have
            drawn = LazyTensor.from_array(param.name, to_numpy(values))
            on_disk[name] = Source(param, drawn, transposed=False)
        values = values.to("meta" if where == "disk" else where)
        module.register_parameter(leaf, nn.Parameter(values))
    model.tie_weights()
    if {*places.values()} & STORES - {main}:
        model.requires_grad_(False)
    index = _index(model, pretrained, on_disk, folder)
    accelerate.dispatch_model(
        model,
        {name: _normal(device) for name, device in mapping.items()},
        main_device=main,
        offload_index=index or None,
        skip_keys="past_key_values",
    )
    model.hf_device_map = dict(mapping)
    used = {entry["safetensors_file"] for entry in index.values()}
    return [file for file in pretrained.reader.named if str(file.path) in used]


def computing_device(module: nn.Embedding) -> torch.device:
    """Where a module computes: where its weight is, or will be brought."""
    hook: Any = getattr(module, "_hf_hook", None)
    return torch.device(hook.execution_device) if is_away(module) else module.weight.device


def is_away(module: nn.Embedding | nn.Linear) -> bool:
    """Whether the weight is brought in for each call."""
    return module.weight.is_meta and getattr(module, "_hf_hook", None) is not None


def _as_mapping(
    accelerate: ModuleType, model: Any, device_map: Device | DeviceMap, max_memory: MaxMemory | None
) -> dict[str, Device]:
    if isinstance(device_map, Mapping):
        return dict(device_map)
    if device_map not in PLANS:
        return {"": device_map}
    options = {"no_split_module_classes": UNDIVIDED, "dtype": model.dtype}
    if device_map == "sequential":
        memory = accelerate.utils.get_max_memory(max_memory)
    else:
        low = device_map == "balanced_low_0"
        memory = accelerate.utils.get_balanced_memory(model, max_memory, low_zero=low, **options)
    return dict(accelerate.infer_auto_device_map(model, memory, **options))


def _places(model: Any, mapping: Mapping[str, Device]) -> dict[str, str]:
    """The device of each parameter by its name in the model, a tied head's too."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    known = {"", *names, *(name for name, _ in model.named_modules())}
    for name in mapping:
        if name not in known:
            hint = did_you_mean(name, known)
            raise InputError(f"device_map names {name!r}, which the model does not have.{hint}")
    places = {}
    for name in names:
        found = [key for key in mapping if not key or f"{name}.".startswith(f"{key}.")]
        if len(found) != 1:
            what = f"found it in {' and '.join(map(repr, found))}" if found else "found none"
            raise InputError(f"device_map: expected one entry that {name} belongs to, {what}.")
        places[name] = _normal(mapping[found[0]])
    table, head = places.get(EMBEDDING_NAME), places.get(TIED_HEAD_NAME)
    if model.config.tie_word_embeddings and head not in (None, table):
        raise InputError(
            f"device_map: the head is tied to the word embeddings: expected one device for both, "
            f"found {table} for {EMBEDDING_NAME} and {head} for {TIED_HEAD_NAME}."
        )
    return places


def _normal(device: Device) -> str:
    """The device's name as PyTorch has it, or "disk"."""
    if device == "disk":
        return "disk"
    try:
        return str(torch.device(device))
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"device_map: expected one of {', '.join(PLANS)}, a device, or modules and their devices "
            f"('disk' is one), found {device!r}: {str(error).splitlines()[0]}"
        ) from error


def _main_device(devices: set[str]) -> str:
    """The device that computes."""
    computing = sorted(devices - STORES) or ["cpu"]
    if len(computing) > 1:
        raise UnsupportedError(
            f"device_map: expected one device that computes beside cpu and disk, found "
            f"{' and '.join(computing)}. Choose one by max_memory={{0: ..., 'cpu': ...}}."
        )
    return computing[0]


def _index(
    model: Any,
    pretrained: Pretrained,
    on_disk: Mapping[str, Source],
    folder: str | os.PathLike[str] | None,
) -> dict[str, dict[str, str]]:
    """The file of each parameter on disk and its name there, as accelerate reads them."""
    reader, dtype = pretrained.reader, MODEL_DTYPES[pretrained.dtype]
    files = {*reader.files} if reader.container == "safetensors" else set()
    tensors = {name: source.tensor for name, source in on_disk.items()}
    others = {
        name: source
        for name, source in on_disk.items()
        if source.transposed or source.tensor.dtype != dtype or source.tensor.info.file not in files
    }
    if others:
        tensors |= _written(model, others, dtype, folder)
    if EMBEDDING_NAME in tensors and model.config.tie_word_embeddings:
        tensors[TIED_HEAD_NAME] = tensors[EMBEDDING_NAME]
    return {
        name: {"safetensors_file": str(tensor.info.file.resolve()), "weight_name": tensor.name}
        for name, tensor in tensors.items()
    }


def _written(
    model: Any,
    sources: Mapping[str, Source],
    dtype: np.dtype[Any],
    folder: str | os.PathLike[str] | None,
) -> dict[str, LazyTensor]:
    """The parameters in files of their own, which are removed when the model is."""
    if folder is None:
        raise InputError(
            f"device_map: expected an offload_folder, as the checkpoint does not hold "
            f"{next(iter(sources))}, which belongs on disk, as safetensors in {dtype}; found none."
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="opt-", dir=folder))
    weakref.finalize(model, shutil.rmtree, own, ignore_errors=True)
    format, architecture = FORMATS[DEFAULT_FORMAT], model.architecture
    outgoing = [Outgoing.of(source, dtype) for source in sources.values()]
    write_weights(own, outgoing, format, architecture)
    with CheckpointReader.open(own) as reader:
        spelt = (format.dialect.name(s.param, architecture) for s in sources.values())
        return {name: reader[found] for name, found in zip(sources, spelt, strict=True)}


def _accelerate() -> ModuleType:
    try:
        import accelerate
    except ImportError as error:
        raise UnsupportedError("device_map needs accelerate: pip install accelerate.") from error
    return accelerate
