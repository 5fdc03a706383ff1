# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, damaged or not, and how that compares with the table of its parameters."""

from __future__ import annotations

import math
import os
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conversion import Checkpoint
from opt_core.checkpoints import CheckpointReader, LazyTensor
from opt_core.checkpoints.containers import recognise
from opt_core.checkpoints.layouts import LAYOUTS
from opt_core.checkpoints.sources import FileSource
from opt_core.config import OPTConfig
from opt_core.dialects import DIALECTS
from opt_core.errors import CheckpointError, ConfigError, FormatError
from opt_core.files import JSON_LIMIT, parse_json_object, plain_name
from opt_core.hub import resolve
from opt_core.loading import LoadReport, match, separate_head
from opt_core.opening import find_config, open_weights
from opt_core.params import param_table
from opt_core.snapshot import read_together

#: The fields of the configuration that make a size.
SUMMARY = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_dim",
    "word_embed_proj_dim",
    "vocab_size",
    "max_position_embeddings",
    "activation_function",
    "do_layer_norm_before",
    "enable_bias",
    "layer_norm_elementwise_affine",
    "tie_word_embeddings",
)
#: Of files that may be weights under no name that is known.
SUFFIXES = {".pt", *(Path(layout.single).suffix for layout in LAYOUTS)}


@dataclass(frozen=True)
class File:
    """A file of weights, or a folder of them."""

    name: str
    nbytes: int | None  # None: an index names it, and it is not there
    tensors: int | None  # None: it cannot be read
    problem: str | None = None  # why


@dataclass(frozen=True)
class Inspection:
    """A checkpoint described, as far as it can be read; everything but the values."""

    directory: str
    container: str | None  # None where it cannot be told
    dialect: str | None  # how the names are spelt; None where they are of no OPT model
    files: tuple[File, ...]
    metadata: dict[str, str]
    architecture: str | None  # None without a config.json
    assumption: str | None  # why the architecture is a guess
    config: dict[str, Any] | None
    dtypes: dict[str, int]  # name -> number of tensors
    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]  # name, dtype, shape, bytes
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]  # an explanation each
    problems: tuple[str, ...]  # damage, and why it could not be compared with the table at all

    @property
    def num_parameters(self) -> int:
        """Scalars in the files; a tied head that is stored twice counts twice."""
        return sum(math.prod(shape) for _, _, shape, _ in self.tensors)

    @property
    def fits(self) -> bool:
        """Whether `from_pretrained` will take it without complaint, as far as can be told."""
        return not (self.missing or self.unexpected or self.mismatched or self.problems)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON; "problem" is None where there is none."""
        return {**asdict(self), "problem": "\n".join(self.problems) or None, "fits": self.fits}


def inspect_checkpoint(source: str | os.PathLike[str]) -> Inspection:
    """Describes a directory, a file of weights, an index of several, or a model of the hub.

    Of a damaged one it tells what can be read.

    Raises:
        HubError: nothing found under that name.
        CheckpointError: others keep writing to the directory.
        UnsupportedError: a library that the format needs is not installed.
    """
    path = Path(source).expanduser()
    path = path if path.is_file() else resolve(source)
    directory = path.parent if path.is_file() else path

    def read(stack: ExitStack) -> tuple[Checkpoint, tuple[File, ...], list[str]]:
        problems: list[str] = []
        try:
            reader = stack.enter_context(closing(open_weights(path)))
            files = _whole_files(reader)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            reader, files = _piecemeal(path)
        config = _config(directory, reader, problems)
        return Checkpoint(directory, config, reader), files, problems

    checkpoint, files, problems = read_together(directory, read)
    with checkpoint:
        reader = checkpoint.reader
        report = _compare(checkpoint, problems)
        return Inspection(
            directory=str(directory),
            container=reader.container or None,
            dialect=_dialect(checkpoint),
            files=files,
            metadata=reader.metadata,
            architecture=checkpoint.architecture if checkpoint.config else None,
            assumption=checkpoint.assumption,
            config=_summary(checkpoint.config),
            dtypes=dict(Counter(str(tensor.dtype) for tensor in reader.values())),
            tensors=tuple(
                (name, str(t.dtype), t.shape, t.info.nbytes) for name, t in reader.items()
            ),
            missing=(*report.missing, *report.missing_head),
            unexpected=(*report.unexpected, *report.other_heads),
            mismatched=report.mismatched,
            problems=tuple(problems),
        )


def _whole_files(reader: CheckpointReader) -> tuple[File, ...]:
    counts = Counter(tensor.info.file for tensor in reader.values())
    if reader.container == "orbax":  # a folder of hundreds
        ((folder, count),) = counts.items()
        return (File(folder.name, sum(map(_nbytes, reader.files)), count),)
    return tuple(File(file.name, _nbytes(file), counts[file]) for file in reader.files)


def _piecemeal(path: Path) -> tuple[CheckpointReader, tuple[File, ...]]:
    """What the headers of a damaged checkpoint's files say, each for itself; all are closed again."""
    files: list[File] = []
    containers: list[str] = []
    tensors: dict[str, LazyTensor] = {}
    metadata: dict[str, str] = {}
    for file in _candidates(path):
        if not file.exists():
            problem = f"{file}: expected it beside the index, found no such file."
            files.append(File(file.name, None, None, problem))
            continue
        try:
            with open_weights(file) as reader:
                files.append(File(file.name, _nbytes(file), len(reader)))
                containers.append(reader.container)
                tensors.update(reader)
                metadata.update(reader.metadata)
        except (CheckpointError, OSError) as error:
            files.append(File(file.name, _nbytes(file), None, str(error)))
            containers += _container(file)
    container = ", ".join(dict.fromkeys(containers))
    return CheckpointReader(container, tensors.values(), metadata=metadata), tuple(files)


def _container(file: Path) -> list[str]:
    """What a damaged file was meant to be; nothing if that cannot be told either."""
    try:
        with closing(FileSource(file)) as source:
            return [recognise(source).name]
    except (CheckpointError, OSError):
        return []


def _candidates(path: Path) -> list[Path]:
    """The files that seem to hold weights, and those that an index names."""
    if path.is_file():
        return [path.with_name(n) for n in _named(path)] if path.suffix == ".json" else [path]
    entries = sorted(entry.name for entry in path.iterdir() if not entry.name.endswith(".json"))
    named = [name for layout in LAYOUTS if layout.index for name in _named(path / layout.index)]
    owned = [name for name in entries if any(layout.owns(name) for layout in LAYOUTS)]
    alike = [name for name in entries if Path(name).suffix in SUFFIXES]
    return [path / name for name in sorted({*named, *owned}) or alike]


def _named(index: Path) -> list[str]:
    """The names of files in an index; none where it cannot be read."""
    if not index.is_file() or index.stat().st_size > JSON_LIMIT:
        return []
    try:
        places = parse_json_object(index.read_bytes(), str(index)).get("weight_map")
    except FormatError:
        return []
    values = places.values() if isinstance(places, dict) else ()
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return sorted({name for name in names if plain_name(name)})


def _nbytes(path: Path) -> int:
    """The size of a file, or of all in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _config(directory: Path, reader: CheckpointReader, problems: list[str]) -> OPTConfig | None:
    try:
        config = find_config(None, directory, reader)
    except (ConfigError, FormatError) as error:
        problems.append(str(error))
        return None
    if config is None:
        problems.append("There is no config.json, so nothing says what should be there.")
    return config


def _compare(checkpoint: Checkpoint, problems: list[str]) -> LoadReport:
    if checkpoint.config is None or not checkpoint.reader:
        return LoadReport()
    try:
        report = match(checkpoint.config, checkpoint.architecture, checkpoint.reader)[1]
        head = separate_head(checkpoint.config, checkpoint.reader)
        if head is not None:
            problems.append(
                f"{head} is not the embedding, though tie_word_embeddings says so: models load with "
                "this head, untied, and a warning. Set tie_word_embeddings to false in config.json."
            )
        return report
    except CheckpointError as error:
        if not problems:  # of a damaged one, it is known why
            problems.append(str(error))
        return LoadReport()


def _dialect(checkpoint: Checkpoint) -> str | None:
    """The dialect that spells most of the names, so that a part of a checkpoint is enough."""
    table = param_table(checkpoint.config or OPTConfig(), checkpoint.architecture)
    present = set(checkpoint.reader)
    spelt = {
        name: sum(not present.isdisjoint(dialect.spellings(param)) for param in table)
        for name, dialect in DIALECTS.items()
    }
    best = max(spelt, key=lambda name: spelt[name])
    return best if spelt[best] else None


def _summary(config: OPTConfig | None) -> dict[str, Any] | None:
    return None if config is None else {name: config.get(name) for name in SUMMARY}
