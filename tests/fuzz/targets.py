# SPDX-License-Identifier: Apache-2.0
"""What is done with a hostile checkpoint, and what may come of it: its values, or one of our errors.

`examine` opens, lists and reads it within the limits. Whatever can be read must lie in the file, be
the same by each way of reading, and equal what the format's own library reads, if it reads anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import safetensors
from numpy.typing import NDArray

from opt_core.checkpoints import CheckpointReader, LazyTensor, safetensors_format
from opt_core.checkpoints.msgpack_format import CHUNKED, DTYPES
from opt_core.checkpoints.orbax_format import find_orbax, read_orbax
from opt_core.checkpoints.sources import FileSource
from opt_core.checkpoints.torch_format import read_pickled
from opt_core.checkpoints.torch_pickle import StoredTensor
from opt_core.config import OPTConfig
from opt_core.errors import OPTError
from opt_core.loading import match
from opt_core.metaseq import open_metaseq
from opt_core.opening import find_config, open_weights
from tests.fuzz.limits import limited

Arrays = dict[str, NDArray[Any]]

READ = "read"
"""The outcome of a file that could be read; that of others is the name of our error."""


class WrongError(Exception):
    """A checkpoint was read, and what was read is not what it holds."""


def examine(reader: str, path: Path) -> str:
    """Return what came of a checkpoint; raises whatever is neither a result nor one of our errors."""
    try:
        with limited():
            arrays = TARGETS[reader](path)
    except OPTError as error:
        return type(error).__name__
    if path.is_file():
        for compare in _ORACLES.get(reader, ()):
            compare(path.read_bytes(), arrays)
    return READ


def _open(path: Path) -> Arrays:
    """Open and read whatever lies there."""
    with open_weights(path) as reader:
        return _read(reader)


def _model(path: Path) -> Arrays:
    """Load a model: read its configuration, hold the tensors against it, read them for a framework."""
    with open_weights(path) as reader:
        config = find_config(None, path, reader)
        if config is None:
            return _read(reader)
        for architecture in ("OPTForSequenceClassification", "OPTForCausalLM"):
            sources, report = match(config, architecture, reader)
            repr(report)
        report.check(where=path)
        room = _room(reader)
        for name, source in sources.items():
            _check_size(source.tensor, room)
            for framework in ("torch", "flax"):
                _expect(name, "mapped", source.read(framework), source.map(framework))
        return {}


def _config(path: Path) -> Arrays:
    """Read a configuration and write it again."""
    config = OPTConfig.from_json_file(path)
    if OPTConfig.from_json_file(path) != config or config.replace() != config:
        raise WrongError(f"{path}: another configuration when it is read again")
    hash(config)
    return {}


def _objects(path: Path) -> Arrays:
    """Read a training run's file with all its objects, and the tensors in it."""
    source = FileSource(path)
    try:
        value, place = read_pickled(source)
        tensors = value if isinstance(value, dict) else {}
        return _read_all(
            {
                name: place(name, tensor)
                for name, tensor in tensors.items()
                if isinstance(tensor, StoredTensor)
            },
            source.size,
        )
    finally:
        source.close()


def _metaseq(path: Path) -> Arrays:
    """Join a checkpoint of metaseq, and infer its configuration."""
    with open_metaseq(path) as reader:
        arrays = _read(reader)
        match(reader.config, "OPTForCausalLM", reader)[1].check(where=path)
        return arrays


def _orbax(path: Path) -> Arrays:
    """Read an orbax directory, whose values may be compressed."""
    tensors, metadata = read_orbax(find_orbax(path) or path)
    repr(metadata)
    stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return _read_all({tensor.name: tensor for tensor in tensors}, max(2**25, 20 * stored))


def _read(reader: CheckpointReader) -> Arrays:
    repr(reader.metadata)
    return _read_all(reader, _room(reader))


def _room(reader: CheckpointReader) -> int:
    return sum(file.stat().st_size for file in reader.files)


def _read_all(tensors: Mapping[str, LazyTensor], room: int) -> Arrays:
    """Read every tensor as a whole, and in one other way."""
    arrays = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        repr(tensor)
        _check_size(tensor, room)
        arrays[name] = tensor.read()
        _OTHER_WAYS[number % len(_OTHER_WAYS)](tensor, arrays[name])
    return arrays


def _check_size(tensor: LazyTensor, room: int) -> None:
    if tensor.info.nbytes > room:
        raise WrongError(f"{tensor}: {tensor.info.nbytes} bytes in files of {room}")


def _by_map(tensor: LazyTensor, array: NDArray[Any]) -> None:
    _expect(tensor.name, "mapped", array, tensor.map())


def _by_blocks(tensor: LazyTensor, array: NDArray[Any]) -> None:
    data = b"".join(block.tobytes() for block in tensor.blocks(64))
    if data != array.tobytes():
        raise WrongError(f"{tensor}: other values by blocks")


def _by_slice(tensor: LazyTensor, array: NDArray[Any]) -> None:
    if array.ndim:
        half = array.shape[-1] // 2
        sliced = tensor.read_slice(array.ndim - 1, half, array.shape[-1])
        _expect(tensor.name, "sliced", array[..., half:], sliced)


def _by_rows(tensor: LazyTensor, array: NDArray[Any]) -> None:
    if array.ndim:
        half = len(array) // 2
        _expect(tensor.name, "in rows", array[:half], tensor.rows(0, half).read())


_OTHER_WAYS = (_by_map, _by_blocks, _by_slice, _by_rows)


def _expect(name: str, what: str, wanted: NDArray[Any], found: NDArray[Any]) -> None:
    """Check that two arrays are the same to the bit."""
    same = wanted.dtype == found.dtype and wanted.shape == found.shape
    if not same or wanted.tobytes() != found.tobytes():
        raise WrongError(
            f"{name!r} {what}: expected {wanted.dtype} {wanted.shape}, found {found.dtype} "
            f"{found.shape}, or other values"
        )


# --- what the formats' own libraries say --------------------------------------------------------


def _compare(wanted: Mapping[str, NDArray[Any]], found: Arrays, library: str) -> None:
    if wanted.keys() != found.keys():
        names = [name[:100] for name in wanted.keys() ^ found.keys()]
        raise WrongError(f"{library} reads other tensors: {names[:5]}")
    for name, array in wanted.items():
        _expect(name, f"by {library}", array, found[name])


def _like_safetensors(data: bytes, arrays: Arrays) -> None:
    """A file that the library refuses must not pass either."""
    if not safetensors_format.matches(data):
        return  # it has become another container
    wanted = {
        name: np.frombuffer(fields["data"], safetensors_format.DTYPES[fields["dtype"]]).reshape(
            fields["shape"]
        )
        for name, fields in safetensors.deserialize(data)
    }
    _compare(wanted, arrays, "safetensors")


def _like_msgpack(data: bytes, arrays: Arrays) -> None:
    """Files that the library refuses may pass: what is no array is not decoded here."""
    try:
        tree = msgpack.unpackb(data, ext_hook=_unpack_array, raw=False)
    except (ValueError, TypeError, KeyError, RecursionError):
        return
    _compare(dict(_flatten(tree, ())), arrays, "msgpack")


def _unpack_array(code: int, data: bytes) -> Any:
    if code not in (1, 3):
        return None
    shape, dtype, values = msgpack.unpackb(data, raw=True)
    return np.frombuffer(values, DTYPES[dtype.decode()]).reshape(shape)


def _flatten(node: Any, path: tuple[str, ...]) -> Any:
    if isinstance(node, dict) and CHUNKED in node:
        parts = [node["chunks"][str(number)] for number in range(len(node["chunks"]))]
        shape = [node["shape"][str(number)] for number in range(len(node["shape"]))]
        yield ".".join(path), np.concatenate(parts).reshape(shape)
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from _flatten(child, (*path, key))
    elif isinstance(node, np.ndarray):
        yield ".".join(path), node


_ORACLES: Mapping[str, tuple[Callable[[bytes, Arrays], None], ...]] = {
    "safetensors": (_like_safetensors,),
    "msgpack": (_like_msgpack,),
}

#: What reads each kind of seed.
TARGETS: Mapping[str, Callable[[Path], Arrays]] = {
    "safetensors": _open,
    "torch-zip": _open,
    "torch-legacy": _open,
    "torch-objects": _objects,
    "hdf5": _open,
    "msgpack": _open,
    "index": _open,
    "model": _model,
    "config": _config,
    "nested": _open,
    "metaseq": _metaseq,
    "orbax": _orbax,
}
