# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints as metaseq does: the exact inverse of reading them, without torch.

No published file was at hand: this follows metaseq's and fairscale's own scripts (`reshard_fsdp.py`,
`stitch_fsdp_ckpt.py`, `local_metadata_dict`) and the metadata of 175B printed in metaseq issue 197.
Names are spelt out here rather than taken from the parameter table, which is what is under test.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.params import param_table

State = dict[str, NDArray[Any]]

# --- pickles ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Object:
    """Pickles as an object of a class that need not exist here: made of arguments, given a state.

    Without arguments it pickles as the class itself.
    """

    name: str
    arguments: tuple[Any, ...] | None = ()
    state: Any = None
    called: bool = False  # as a function, instead of by __new__


def namespace(**values: Any) -> Object:
    """An argparse.Namespace."""
    return Object("argparse.Namespace", state=values)


def omegaconf(value: Any, parent: Any = None) -> Object:
    """A node of OmegaConf; each knows its parent, so there are cycles."""
    anything = Object("typing.Any", None)
    kind = (
        "omegaconf.base.ContainerMetadata" if isinstance(value, dict) else "omegaconf.base.Metadata"
    )
    types = {"key_type": anything, "element_type": anything} if isinstance(value, dict) else {}
    metadata = {
        "ref_type": anything,
        "object_type": None,
        "optional": True,
        "flags": {},
        "key": None,
    }
    node = Object(
        "omegaconf.dictconfig.DictConfig" if isinstance(value, dict) else "omegaconf.nodes.AnyNode",
        state={"_metadata": Object(kind, state={**metadata, **types}), "_parent": parent},
    )
    if isinstance(value, dict):
        node.state["_content"] = {key: omegaconf(entry, node) for key, entry in value.items()}
    else:
        node.state["_val"] = value
    return node


_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}


class Emitter:
    """Pickles in protocol 2 as torch.save does; arrays become tensors, views share a storage."""

    def __init__(self) -> None:
        self.storages: list[NDArray[Any]] = []
        self._keys: dict[int, int] = {}
        self._memo: dict[int, int] = {}

    def emit(self, value: Any) -> bytes:
        match value:
            case None:
                return b"N"
            case bool():
                return b"\x88" if value else b"\x89"
            case int() if 0 <= value < 2**31:
                return b"J" + struct.pack("<i", value)
            case int():
                data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
                return b"\x8a" + bytes([len(data)]) + data
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
            case tuple():
                return b"(" + b"".join(map(self.emit, value)) + b"t"
            case list():
                return b"](" + b"".join(map(self.emit, value)) + b"e"
            case dict():
                pairs = b"".join(self.emit(k) + self.emit(v) for k, v in value.items())
                return b"}(" + pairs + b"u"
            case np.ndarray():
                return self._tensor(value)
            case Object():
                return self._object(value)
        raise TypeError(f"no pickle for {value!r}")

    def _object(self, value: Object) -> bytes:
        if id(value) in self._memo:
            return b"j" + struct.pack("<I", self._memo[id(value)])
        if value.arguments is None:
            return self._global(value.name)
        self._memo[id(value)] = len(self._memo)
        made = self._global(value.name) + self.emit(value.arguments)
        made += b"R" if value.called else b"\x81"
        made += b"r" + struct.pack("<I", self._memo[id(value)])
        return made if value.state is None else made + self.emit(value.state) + b"b"

    def _tensor(self, array: NDArray[Any]) -> bytes:
        base = array if array.base is None or not isinstance(array.base, np.ndarray) else array.base
        if id(base) not in self._keys:
            self._keys[id(base)] = len(self.storages)
            self.storages.append(base)
        key = self._keys[id(base)]
        place = array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        strides = tuple(stride // array.itemsize for stride in array.strides)
        storage = (
            b"("
            + self.emit("storage")
            + self._global(f"torch.{_STORAGES[array.dtype]}")
            + b"".join(map(self.emit, (str(key), "cpu", base.size)))
            + b"tQ"
        )
        rest = (place // array.itemsize, array.shape, strides, False)
        hooks = self._global("collections.OrderedDict") + b")R"
        arguments = b"(" + storage + b"".join(map(self.emit, rest)) + hooks + b"t"
        return self._global("torch._utils._rebuild_tensor_v2") + arguments + b"R"

    @staticmethod
    def _global(name: str) -> bytes:
        module, _, last = name.rpartition(".")
        return f"c{module}\n{last}\n".encode()


def save(path: Path, value: Any) -> None:
    """Write a value as torch.save does since 1.6."""
    emitter = Emitter()
    program = b"\x80\x02" + emitter.emit(value) + b"."
    save_program(path, program, emitter.storages)


def save_program(path: Path, program: bytes, storages: Sequence[NDArray[Any]]) -> None:
    """Write a pickle and the storages that it mentions."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), program)
        for key, array in enumerate(storages):
            archive.writestr(zipfile.ZipInfo(f"archive/data/{key}"), array.tobytes())
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


# --- models -------------------------------------------------------------------------------------


def random_state(config: OPTConfig, dtype: Any = np.float16, seed: int = 0) -> State:
    """Values for every parameter of a model under its canonical name, no two alike."""
    rng = np.random.default_rng(seed)
    return {
        param.name: rng.standard_normal(param.shape, np.float32).astype(dtype)
        for param in param_table(config)
    }


def metaseq_state(state: State, *, fused: bool = True) -> State:
    """The state dict under metaseq's names, with k, v and q in one if `fused`."""
    renamed: State = {}
    for name, array in state.items():
        name = name.removeprefix("model.")
        name = name.replace("decoder.final_layer_norm", "decoder.layer_norm")
        name = name.replace(".project_in.", ".project_in_dim.")
        renamed[name.replace(".project_out.", ".project_out_dim.")] = array
    if not fused:
        return renamed
    out: State = {}
    for name, array in renamed.items():
        if ".q_proj." in name:
            order = [name.replace("q_proj", module) for module in ("k_proj", "v_proj", "q_proj")]
            out[name.replace("q_proj", "qkv_proj")] = np.concatenate([renamed[n] for n in order])
        elif ".k_proj." not in name and ".v_proj." not in name:
            out[name] = array
    return out


def split_parts(state: State, parts: int) -> list[State]:
    """Split over model-parallel parts as Megatron's layers are, the state under metaseq's names."""
    out: list[State] = [{} for _ in range(parts)]
    for name, array in state.items():
        module, leaf = name.split(".")[-2:]
        if module == "qkv_proj":
            thirds = [np.split(third, parts) for third in np.split(array, 3)]
            pieces = [np.concatenate(piece) for piece in zip(*thirds, strict=True)]
        elif module in ("q_proj", "k_proj", "v_proj", "fc1", "embed_tokens"):
            pieces = np.split(array, parts)
        elif module in ("out_proj", "fc2") and leaf == "weight":
            pieces = np.split(array, parts, axis=1)
        else:  # norms, positions, projections of embeddings, biases of row-parallel layers
            pieces = [array] * parts
        for part, piece in zip(out, pieces, strict=True):
            part[name] = np.ascontiguousarray(piece)
    return out


@dataclass
class Shards:
    """The contents of the files of one part: `model` and `shard_metadata` of each rank."""

    models: list[dict[str, Any]] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)


SHARED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")


def shard(part: State, world: int, *, size: bool = False) -> Shards:
    """Flatten one part as fairscale does: the root and each layer are FSDP modules.

    `size`: shapes are pickled as torch.Size, as they are since fairscale 0.4.
    """
    groups: dict[str, State] = {"": {}}
    for name, array in part.items():
        path = ".".join(name.split(".")[:3]) if name.startswith("decoder.layers.") else ""
        groups.setdefault(path, {})[name.removeprefix(path + ".")] = array
    out = Shards([{} for _ in range(world)], [])
    described: list[list[dict[str, Any]]] = [[] for _ in range(world)]
    for path, group in groups.items():
        flat = np.concatenate([array.reshape(-1) for array in group.values()])
        length = math.ceil(len(flat) / world)
        key = f"{path}.flat_param_0" if path else "flat_param_0"
        shapes = [
            Object("torch.Size", (a.shape,), called=True) if size else a.shape
            for a in group.values()
        ]
        for rank in range(world):
            chunk = flat[rank * length : (rank + 1) * length]
            padding = length - len(chunk)
            out.models[rank][key] = np.concatenate([chunk, np.full(padding, 77, flat.dtype)])
            described[rank].append(
                {
                    "fsdp_path": path,
                    "params": {
                        "flat_param_0": {
                            "names": list(group),
                            "shapes": shapes,
                            "numels": [a.size for a in group.values()],
                            "padding": padding,
                        }
                    },
                    "no_broadcast_optim_state": False,
                    "shared_param_info": [] if path else [SHARED],
                }
            )
    for rank in range(world):
        out.models[rank]["decoder.version"] = np.array([3], np.float32)
        out.metadata.append(
            {"param_metadata": described[rank], "buffer_names": ["decoder.version"]}
        )
    return out


def run(model: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All that a file of a training run holds around its model."""
    settings = {"_name": "transformer_lm_megatron", **(settings or {})}
    return {
        "cfg": {
            "_name": None,
            "common": {"fp16": True, "seed": 1},
            "model": namespace(**settings),
            "task": omegaconf({"_name": "language_modeling", "sample_break_mode": "none"}),
        },
        "args": None,
        "model": dict(model),
        "optimizer_history": [
            {"criterion_name": "CrossEntropyCriterion", "num_updates": 7, "lr_scheduler_state": {}}
        ],
        "extra_state": {
            "train_iterator": {"epoch": 1, "iterations_in_epoch": 7},
            "val_loss": 2.5,
            "path": Object("pathlib.PosixPath", ("data",), called=True),
            "device": Object("torch.device", ("cuda", 0), called=True),
        },
        "last_optimizer_state": {"state": {0: {"step": 7}}, "param_groups": [{"params": [0]}]},
    }


# --- layouts ------------------------------------------------------------------------------------


def write_single(folder: Path, state: State, *, fused: bool = True, bare: bool = False) -> Path:
    """`restored.pt`: one file, unflattened; `bare` without anything around the state dict."""
    model: State = {
        "decoder.version": np.array([3], np.float32),
        **metaseq_state(state, fused=fused),
    }
    save(folder / "restored.pt", model if bare else run(model))
    return folder / "restored.pt"


def write_parts(
    folder: Path, state: State, parts: int, *, fused: bool = True, stem: str = "reshard"
) -> None:
    """`reshard-model_part-*.pt` as of 2023: unflattened, with the output projection."""
    for number, part in enumerate(split_parts(metaseq_state(state, fused=fused), parts)):
        model = {**part, SHARED[1]: part[SHARED[0]], "decoder.version": np.array([3], np.float32)}
        save(folder / f"{stem}-model_part-{number}.pt", {**run(model), "shard_metadata": {}})


def write_flat_parts(folder: Path, state: State, parts: int, *, metadata: bool = True) -> None:
    """`reshard-model_part-*.pt` as of 2022: one rank each, with or without metadata."""
    for number, part in enumerate(split_parts(metaseq_state(state), parts)):
        shards = shard(part, 1)
        content = run(shards.models[0])
        if metadata:
            content["shard_metadata"] = shards.metadata[0]
        save(folder / f"reshard-model_part-{number}.pt", content)


def write_shards(
    folder: Path,
    state: State,
    world: int,
    *,
    parts: int | None = None,
    fused: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """`checkpoint_last[-model_part-*]-shard*.pt`: what training itself saves."""
    split: Sequence[State] = split_parts(metaseq_state(state, fused=fused), parts or 1)
    for number, part in enumerate(split):
        shards = shard(part, world, size=True)
        suffix = "" if parts is None else f"-model_part-{number}"
        for rank in range(world):
            content = {
                **run(shards.models[rank], settings),
                "shard_metadata": shards.metadata[rank],
            }
            save(folder / f"checkpoint_last{suffix}-shard{rank}.pt", content)
