# SPDX-License-Identifier: Apache-2.0
"""Small valid checkpoints of every container and dialect, from which the fuzzers start.

Our own writers make most of them; the golden files of the reference and archives within archives
come besides. All are made anew in each process, the same bytes each time.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints import CheckpointWriter, Layout, LazyTensor
from opt_core.config import CONFIG_NAME, OPTConfig
from opt_core.formats import FORMATS, Format
from opt_core.params import param_table
from tests.fuzz.folder_seeds import metaseq_folders, orbax_folders, read_folder

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = {
    "pre": OPTConfig(10, 4, 1, 6, 6, num_attention_heads=2),
    "post": OPTConfig(
        *(10, 4, 2, 6, 6),
        word_embed_proj_dim=2,
        num_attention_heads=2,
        do_layer_norm_before=False,
        architectures=["OPTForSequenceClassification"],
        eos_token_id=[2, 3],
        id2label={0: "no", 1: "yes", 2: "perhaps"},
        problem_type="single_label_classification",
        tie_word_embeddings=False,
        torch_dtype="float16",
        _name_or_path="x",
    ),
}
_SHAPES = ((3, 5), (20,), (), (0, 4), (2, 1, 3, 1, 2))
_DTYPES = tuple(
    map(np.dtype, ("f8", "f4", "f2", ml_dtypes.bfloat16, "i8", "i4", "i2", "i1", "u1", "?"))
)

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Seed:
    """A valid checkpoint: its files by their names in a folder, and what of it is opened.

    Attributes:
        name: says what it is, and stays the same from run to run.
        reader: the one that reads it, a key of targets.TARGETS.
        files: the content of each.
        entry: the file that is opened; "" for the folder.
        focus: the files that are changed; all if there are none.
    """

    name: str
    reader: str
    files: Mapping[str, bytes]
    entry: str = ""
    focus: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the files to change."""
        return self.focus or tuple(self.files)


@cache
def all_seeds() -> Mapping[str, Sequence[Seed]]:
    """Every seed, by its reader."""
    made = [*_models(), *_every_dtype(), *_golden(), *_folders()]
    made += _nested([seed for seed in made if len(seed.files) == 1])
    seeds: dict[str, list[Seed]] = {}
    for seed in made:
        seeds.setdefault(seed.reader, []).append(seed)
    return seeds


def _models() -> Iterator[Seed]:
    """A model in each format: whole and as one file, in shards behind an index, with its config."""
    for title, config in CONFIGS.items():
        settings = {CONFIG_NAME: config.to_json_string().encode()}
        counted = json.dumps({"model_type": "opt", "num_labels": 3, "dtype": "bfloat16"}).encode()
        yield Seed(f"counted-{title}", "config", {CONFIG_NAME: counted}, CONFIG_NAME)
        yield Seed(f"config-{title}", "config", settings, CONFIG_NAME)
        for name, form in FORMATS.items():
            arrays = _model_arrays(config, form)
            whole = _written(form.layout, arrays)
            folder = len(whole) > 1
            entry = "" if folder else next(iter(whole))
            yield Seed(f"{name}-{title}", _reader(name), whole, entry)
            yield Seed(f"model-{name}-{title}", "model", whole | settings)
            if form.layout.index is not None:
                shards = _written(form.layout, arrays, size=300)
                index = form.layout.index
                yield Seed(f"index-{name}-{title}", "index", shards, index, focus=(index,))
                yield Seed(f"shards-{name}-{title}", "model", shards | settings)


def _reader(name: str) -> str:
    """The reader of a format."""
    container = {"bin": "torch-zip", "bin-legacy": "torch-legacy", "h5": "hdf5", "keras": "hdf5"}
    return "safetensors" if name.endswith("safetensors") else container.get(name, name)


def _model_arrays(config: OPTConfig, form: Format) -> dict[str, NDArray[Any]]:
    """The parameters of a model as a format spells and lays them out."""
    random = np.random.default_rng(0)
    return {
        form.dialect.name(param, "OPTForCausalLM"): random.standard_normal(
            param.shape[::-1] if form.dialect.transposed(param) else param.shape, np.float32
        )
        for param in param_table(config)
    }


def _every_dtype() -> Iterator[Seed]:
    """Arrays of each dtype and many shapes in each format that has one file."""
    for name in ("safetensors", "bin", "bin-legacy", "h5", "keras", "msgpack"):
        arrays = {
            f"a/{dtype}/{number}" if name in ("h5", "keras") else f"a.{dtype}.{number}": np.arange(
                np.prod(shape, dtype=int)
            )
            .reshape(shape)
            .astype(dtype)
            for dtype in _DTYPES
            for number, shape in enumerate(_SHAPES)
        }
        files = _written(FORMATS[name].layout, arrays)
        yield Seed(f"dtypes-{name}", _reader(name), files, next(iter(files)))


def _written(layout: Layout, arrays: Arrays, size: int | str = "1GB") -> dict[str, bytes]:
    """The files of a checkpoint that holds these arrays."""
    tensors = [LazyTensor.from_array(name, array) for name, array in arrays.items()]
    with TemporaryDirectory() as folder:
        with CheckpointWriter(Path(folder), tensors, layout, max_shard_size=size) as writer:
            for tensor in tensors:
                writer.write(tensor.name, tensor.blocks())
        return read_folder(Path(folder))


def _folders() -> Iterator[Seed]:
    """Checkpoints of metaseq and orbax."""
    for title, config in CONFIGS.items():
        settings = {CONFIG_NAME: config.to_json_string().encode()}
        for name, files in metaseq_folders(config):
            yield Seed(f"metaseq-{name}-{title}", "metaseq", files)
            yield Seed(f"metaseq-{name}-{title}-config", "metaseq", files | settings)
    for name, files in orbax_folders(_model_arrays(CONFIGS["pre"], FORMATS["msgpack"])):
        yield Seed(f"orbax-{name}", "orbax", files)


def _golden() -> Iterator[Seed]:
    """What the reference, and torch, wrote."""
    for path in sorted((GOLDEN / "torch_bins").glob("*.bin")):
        reader = "torch-legacy" if "legacy" in path.stem else "torch-zip"
        yield Seed(f"golden-{path.stem}", reader, {path.name: path.read_bytes()}, path.name)
        yield Seed(
            f"objects-{path.stem}", "torch-objects", {path.name: path.read_bytes()}, path.name
        )
    readers = {"bin": "torch-zip", "bin_legacy": "torch-legacy", "h5": "hdf5", "msgpack": "msgpack"}
    for name, reader in readers.items():
        for folder in sorted((GOLDEN / "formats").glob(f"*/{name}")):
            (weights,) = (path for path in folder.iterdir() if path.name != CONFIG_NAME)
            files = {weights.name: weights.read_bytes()}
            yield Seed(f"golden-{folder.parent.name}-{name}", reader, files, weights.name)


def _nested(singles: Sequence[Seed]) -> Iterator[Seed]:
    """Archives within archives, and files that are two things at once."""
    small = {seed.reader: seed for seed in sorted(singles, key=lambda seed: -len(_data(seed)))}
    for reader, seed in small.items():
        data = _data(seed)
        wrapped = {
            "gzip": gzip.compress(data, mtime=0),
            "zip": _zipped({"archive/data.pkl": data}, zipfile.ZIP_STORED),
            "deflated": _zipped({"archive/data.pkl": data}, zipfile.ZIP_DEFLATED),
            "tar": _tarred(data),
            "behind": _data(small["torch-zip"]) + data,
            "before": data + _data(small["torch-zip"]),
        }
        values = np.frombuffer(data, np.uint8)
        for name in ("safetensors", "bin", "bin-legacy", "h5", "msgpack"):
            wrapped[name] = next(iter(_written(FORMATS[name].layout, {"inner": values}).values()))
        for how, content in wrapped.items():
            yield Seed(f"nested-{reader}-{how}", "nested", {"file": content}, "file")


def _data(seed: Seed) -> bytes:
    return next(iter(seed.files.values()))


def _zipped(members: Mapping[str, bytes], method: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return stream.getvalue()


def _tarred(data: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("pickle")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()
