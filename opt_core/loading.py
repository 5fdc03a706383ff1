# SPDX-License-Identifier: Apache-2.0
"""Holds a checkpoint against the parameter table before a byte of it is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opt_core.checkpoints.tensors import BLOCK, LazyTensor, empty_aligned
from opt_core.config import OPTConfig
from opt_core.dialects import Dialect, recognise
from opt_core.dtypes import MODEL_DTYPES, dtype_name
from opt_core.errors import CheckpointError
from opt_core.params import ARCHITECTURES, Param, param_table
from opt_core.presets import PRESETS

#: For who calls from Python: notes show in a traceback, and no command repeats them.
_SHAPES = "With ignore_mismatched_sizes=True these keep their initial values."
_REPORTS = "With output_loading_info=True the rest is loaded, and this reported."


@dataclass(frozen=True)
class Source:
    """Where a parameter's values lie: a tensor of the checkpoint, perhaps stored transposed."""

    param: Param
    tensor: LazyTensor
    transposed: bool  # with respect to the canonical layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in canonical layout."""
        return self.tensor.shape[::-1] if self.transposed else self.tensor.shape

    def read(self, framework: str) -> np.ndarray:
        """A fresh contiguous array in that framework's layout and the file's dtype."""
        array = self.tensor.read()
        return transpose(array) if self.turns_for(framework) else array

    def map(self, framework: str) -> np.ndarray:
        """As `read`, but a view on the file where it already holds the framework's layout."""
        return self.read(framework) if self.turns_for(framework) else self.tensor.map()

    def blocks(self, transposed: bool, dtype: np.dtype[Any] | None = None) -> Iterator[np.ndarray]:
        """The values in C order in arrays of a few megabytes, for a file with matrices so laid out.

        Args:
            transposed: whether that file's layout is transposed with respect to the canonical one.
            dtype: to cast to; None keeps the source's.

        Raises:
            CheckpointError: a value that `dtype` cannot hold.
        """
        blocks = self.tensor.blocks()
        if self.turns(transposed):
            blocks = transposed_blocks(self.tensor.read_stored())
        for block in blocks:
            yield block if dtype is None else cast(block, dtype, self.param.name)

    def turns(self, transposed: bool) -> bool:
        """Whether the matrix has to be transposed for a layout that is, or is not, transposed."""
        return self.transposed != transposed

    def turns_for(self, framework: str) -> bool:
        """Whether the matrix has to be transposed for a framework."""
        return self.turns(self.param.transposed(framework))


def transpose(matrix: np.ndarray) -> np.ndarray:
    """The transposed matrix, aligned and in C order.

    By blocks of rows that stay in the CPU's cache: for (8192, 2048) in float32 in a quarter of the
    time of numpy's own copy.
    """
    out = empty_aligned(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), 64):
        out[:, start : start + 64] = matrix[start : start + 64].T
    return out


def transposed_blocks(matrix: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of the transposed matrix, as many at a time as make a block."""
    step = max(1, BLOCK // max(1, len(matrix) * matrix.itemsize))
    for start in range(0, matrix.shape[1], step):
        yield transpose(matrix[:, start : start + step])


def cast(array: np.ndarray, dtype: np.dtype[Any], name: str) -> np.ndarray:
    """The values in another dtype; raises CheckpointError for a number that it cannot hold."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and nan stay what they are
        result = array.astype(dtype)
    lost = np.isinf(result) & np.isfinite(array)
    if lost.any():
        wider = "float64" if dtype == np.float32 else "bfloat16 or float32"
        raise CheckpointError(
            f"{name}: expected values that {dtype} can hold, found one of "
            f"{float(np.abs(array[lost]).max()):g}. Choose {wider}."
        )
    return result


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint lacks, has beyond the table, or has in another shape; canonical names."""

    missing: tuple[str, ...] = ()
    missing_head: tuple[str, ...] = ()  # a checkpoint of the base model: the head starts anew
    unexpected: tuple[str, ...] = ()
    other_heads: tuple[str, ...] = ()  # known, but of another class of model
    mismatched: tuple[str, ...] = ()  # one explanation each
    mismatched_names: tuple[str, ...] = ()

    def check(
        self, *, where: object, ignore_mismatched_sizes: bool = False, tolerate: bool = False
    ) -> None:
        """Raises about what cannot be loaded; a head that is missing is no error.

        Args:
            where: what the messages call the checkpoint.
            ignore_mismatched_sizes: tensors of another shape keep their initial values.
            tolerate: the caller takes the report itself; only shapes are still an error.

        Raises:
            CheckpointError: missing, unexpected or mismatched tensors.
        """
        if self.mismatched and not ignore_mismatched_sizes:
            error = CheckpointError(
                f"{where} does not fit the configuration:\n  "
                + "\n  ".join(_shorten(self.mismatched))
            )
            error.add_note(_SHAPES)
            raise error
        if tolerate:
            return
        if self.missing:
            error = CheckpointError(
                f"{where} lacks {len(self.missing)} tensors that the configuration asks for: "
                f"{', '.join(_shorten(self.missing))}. Is a shard missing, or num_hidden_layers, "
                "enable_bias or another option of config.json wrong?"
            )
            error.add_note(_REPORTS)
            raise error
        if self.unexpected:
            error = CheckpointError(
                f"{where} holds {len(self.unexpected)} tensors that the configuration has no place "
                f"for: {', '.join(_shorten(self.unexpected))}. Is num_hidden_layers, enable_bias "
                "or another option of config.json wrong?"
            )
            error.add_note(_REPORTS)
            raise error

    def warn_of_new_head(self, where: object) -> None:
        """Says which parameters of a head start anew, if any do."""
        if self.missing_head:
            warnings.warn(
                f"{where} has no {', '.join(self.missing_head)}: initialised anew. Train the model "
                "before you use this head.",
                stacklevel=4,
            )

    def loading_info(self) -> dict[str, list[str]]:
        """The report under the keys of the reference's `output_loading_info`."""
        return {
            "missing_keys": [*self.missing, *self.missing_head],
            "unexpected_keys": [*self.unexpected, *self.other_heads],
            "mismatched_keys": list(self.mismatched_names),
            "error_msgs": [],
        }


def match(
    config: OPTConfig, architecture: str, tensors: Mapping[str, LazyTensor]
) -> tuple[dict[str, Source], LoadReport]:
    """Finds each parameter of the model among the checkpoint's tensors.

    Returns:
        The sources by canonical name (only those that fit), and the report of all else.

    Raises:
        CheckpointError: not an OPT checkpoint, or one parameter under two names.
    """
    table = param_table(config, architecture)
    dialect = recognise(tensors, table[0])
    claimed = _claimed(config, architecture, dialect)
    sources: dict[str, Source] = {}
    missing: list[Param] = []
    mismatched: dict[str, str] = {}
    used: set[str] = set()
    for param in table:
        name = _find(dialect, param, tensors)
        if name is None or name in claimed:
            missing.append(param)
            continue
        used.add(name)
        source = Source(param, tensors[name], dialect.transposed(param))
        _check_dtype(source)
        if source.shape == param.shape:
            sources[param.name] = source
        else:
            mismatched[param.name] = _explain_mismatch(config, source)
    head = _tied_head(config) if architecture == "OPTForCausalLM" else None
    used.update(dialect.spellings(head) if head else ())
    rest = [name for name in tensors if name not in used and not dialect.drops(name)]
    known = {s for param in _other_heads(config, architecture) for s in dialect.spellings(param)}
    return sources, LoadReport(
        missing=tuple(param.name for param in missing if param.in_base_model),
        missing_head=tuple(param.name for param in missing if not param.in_base_model),
        unexpected=tuple(name for name in rest if name not in known),
        other_heads=tuple(name for name in rest if name in known),
        mismatched=tuple(mismatched.values()),
        mismatched_names=tuple(mismatched),
    )


def match_added(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, LazyTensor], report: LoadReport
) -> tuple[dict[str, LazyTensor], LoadReport]:
    """Finds what a model has beyond the table, by its own names, among what `match` left over.

    Args:
        shapes: of the tensors of modules of the user's, by name.
        tensors: the checkpoint's.
        report: of `match`.

    Returns:
        The tensors that fit, and the report with all of these taken into account.
    """
    present = {name for name in shapes if name in (*report.unexpected, *report.other_heads)}
    mismatched = {
        name: f"{name}: expected {shapes[name]}, as the model has it, found {tensors[name].shape}."
        for name in shapes
        if name in present and tensors[name].shape != shapes[name]
    }
    found = {name: tensors[name] for name in present.difference(mismatched)}
    missing = tuple(name for name in shapes if name not in present)
    return found, replace(
        report,
        missing_head=(*report.missing_head, *missing),
        unexpected=tuple(name for name in report.unexpected if name not in present),
        other_heads=tuple(name for name in report.other_heads if name not in present),
        mismatched=(*report.mismatched, *mismatched.values()),
        mismatched_names=(*report.mismatched_names, *mismatched),
    )


def _find(dialect: Dialect, param: Param, tensors: Mapping[str, LazyTensor]) -> str | None:
    found = [name for name in dialect.spellings(param) if name in tensors]
    found = [name for name in found if not dialect.drops(name)] or found
    if len(found) > 1:
        raise CheckpointError(
            f"{param.name} is stored {len(found)} times, as {' and '.join(found)}: "
            "only one of them can be right. Remove the others from the checkpoint."
        )
    return found[0] if found else None


def named_architecture(config: OPTConfig) -> str | None:
    """The class of model that a configuration names, by its name in PyTorch; None if none of ours."""
    names = (n.removeprefix("TF").removeprefix("Flax") for n in config.architectures or ())
    return next((name for name in names if name in ARCHITECTURES), None)


def _claimed(config: OPTConfig, architecture: str, dialect: Dialect) -> set[str]:
    """Names of another class's head, where the configuration names that class.

    Keras' files spell the heads of all classes alike.
    """
    named = named_architecture(config)
    if named in (None, architecture):
        return set()
    return {name for param in _heads(config, named) for name in dialect.spellings(param)}


def _check_dtype(source: Source) -> None:
    if source.tensor.dtype not in MODEL_DTYPES.values():
        raise CheckpointError(
            f"{source.tensor.info.file}: {source.tensor.name}: expected floating-point values "
            f"({', '.join(MODEL_DTYPES)}), found {source.tensor.dtype}. Is the model quantized? Take "
            "the one that it was made from."
        )


def _heads(config: OPTConfig, architecture: str) -> list[Param]:
    """What a class of model has beyond its base model."""
    return [param for param in param_table(config, architecture) if not param.in_base_model]


def _other_heads(config: OPTConfig, architecture: str) -> Iterator[Param]:
    """Head parameters of the other classes of model."""
    untied = config.replace(tie_word_embeddings=False)
    for other in ARCHITECTURES:
        if other != architecture:
            yield from _heads(untied, other)


def _tied_head(config: OPTConfig) -> Param | None:
    """The head that is the embedding again; None where the configuration does not tie them."""
    if not config.tie_word_embeddings:
        return None
    (head,) = _heads(config.replace(tie_word_embeddings=False), "OPTForCausalLM")
    return head


def separate_head(config: OPTConfig, tensors: Mapping[str, LazyTensor]) -> str | None:
    """The name of a stored head that is not the embedding, though the configuration ties the two.

    Values are read only where a checkpoint stores the head beside the embedding.

    Raises:
        CheckpointError: not an OPT checkpoint, or one parameter under two names.
    """
    head = _tied_head(config)
    if head is None:
        return None
    table = param_table(config)
    dialect = recognise(tensors, table[0])
    names = tensors.keys() - _claimed(config, "OPTForCausalLM", dialect)
    copies = [name for name in dialect.spellings(head) if name in names]
    embedding = _find(dialect, table[0], tensors) if copies else None
    if embedding is None:
        return None
    source = Source(table[0], tensors[embedding], dialect.transposed(table[0]))
    for name in copies:
        if not _same_values(source, Source(head, tensors[name], dialect.transposed(head))):
            return name
    return None


def _same_values(first: Source, second: Source) -> bool:
    if first.tensor.lies_where(second.tensor):
        return True
    pieces = pairs(first.blocks(False), second.blocks(False))
    return first.shape == second.shape and all(np.array_equal(x, y, True) for x, y in pieces)


#: Elements of a piece.
_PIECE = 2**20


def pairs(
    first: Iterable[np.ndarray], second: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two streams of blocks in flat pieces of equal lengths; the last may be of unequal ones."""
    left, right = _pieces(first), _pieces(second)
    x, y = next(left, None), next(right, None)
    while x is not None and y is not None:
        length = min(len(x), len(y))
        yield x[:length], y[:length]
        x = x[length:] if length < len(x) else next(left, None)
        y = y[length:] if length < len(y) else next(right, None)
    if x is not None or y is not None:
        nothing = np.empty(0)
        yield (nothing if x is None else x), (nothing if y is None else y)


def _pieces(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The values of blocks in flat pieces that are small enough to be compared as float64."""
    for block in blocks:
        flat = block.reshape(-1)
        for start in range(0, len(flat), _PIECE):
            yield flat[start : start + _PIECE]


def _explain_mismatch(config: OPTConfig, source: Source) -> str:
    param, info = source.param, source.tensor.info
    alike = [p for p in PRESETS if param.spec.shape(OPTConfig.preset(p)) == source.shape]
    hint = f" The checkpoint looks like {' or '.join(alike)}; check the config." if alike else ""
    return (
        f"{param.name}: expected {param.shape} from config.json ({param.spec.explain(config)}), "
        f"found {source.shape} in {info.file.name}.{hint}"
    )


def resolve_dtype(dtype: Any, config: OPTConfig, tensors: Mapping[str, LazyTensor]) -> str:
    """The name of the dtype to load in: the one asked for; float32 by default.

    For "auto", the config's `torch_dtype`, else that of the checkpoint's first tensor.
    """
    if dtype is None:
        return "float32"
    if isinstance(dtype, str) and dtype == "auto":
        dtype = config.torch_dtype or next(iter(tensors.values())).dtype
    return dtype_name(dtype)


def _shorten(names: tuple[str, ...], most: int = 8) -> list[str]:
    return [*names[:most], f"and {len(names) - most} more"] if len(names) > most else list(names)
