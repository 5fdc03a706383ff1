# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained` and `save_pretrained` up to the point where a framework is needed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from opt_core.checkpoints import CheckpointReader, LazyTensor
from opt_core.config import CONFIG_NAME, FIELDS, OPTConfig
from opt_core.errors import ConfigError, InputError
from opt_core.formats import DEFAULT_FORMAT, FORMATS, shadows
from opt_core.generation.config import (
    GENERATION_CONFIG_NAME,
    SPECIAL_TOKENS,
    GenerationConfig,
)
from opt_core.hub import HUB_OPTIONS, resolve, take_hub_options
from opt_core.loading import (
    LoadReport,
    Source,
    match,
    match_added,
    resolve_dtype,
    separate_head,
)
from opt_core.opening import find_config, open_weights
from opt_core.params import Param
from opt_core.saving import Added, Outgoing, write_weights
from opt_core.snapshot import read_together
from opt_core.staging import staged
from opt_core.validation import did_you_mean

#: Of several kinds of weights in one place, those of that framework are taken. What a file holds is
#: told by its names, so that each is read without these.
PREFERRED = {"from_pt": "pt", "from_tf": "tf", "from_flax": "flax"}


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that fits its configuration: what a backend needs to build and fill a model.

    As a context manager it closes the checkpoint's files at the end; arrays mapped from them live on.
    If one was written to meanwhile, a good end is a CheckpointError.
    """

    config: OPTConfig
    generation_config: GenerationConfig
    dtype: str  # name of the dtype to load in; in Flax, to compute in
    is_named: bool  # whether the caller named it; else it is the default, or "auto"
    stored_dtype: str  # what "auto" stands for
    reader: CheckpointReader
    sources: dict[str, Source]
    report: LoadReport
    where: str  # what messages call it
    ignore_mismatched_sizes: bool
    output_loading_info: bool

    def check(
        self, added: Mapping[str, tuple[int, ...]] | None = None
    ) -> tuple[dict[str, LazyTensor], LoadReport]:
        """Holds what is missing, unexpected or of another shape against what the caller asked for.

        Args:
            added: names and shapes of what the model has beyond the parameter table.

        Returns:
            The tensors found for these, and the report.

        Raises:
            CheckpointError: tensors are missing, unexpected or of another shape.
        """
        found, report = match_added(added or {}, self.reader, self.report)
        report.check(
            where=self.where,
            ignore_mismatched_sizes=self.ignore_mismatched_sizes,
            tolerate=self.output_loading_info,
        )
        if not self.output_loading_info:
            report.warn_of_new_head(self.where)
        return found, report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.reader.__exit__(kind, error, traceback)


def open_pretrained(
    name_or_path: str | os.PathLike[str],
    architecture: str,
    *,
    config: OPTConfig | str | os.PathLike[str] | None = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    ignore_mismatched_sizes: bool = False,
    output_loading_info: bool = False,
    **options: Any,
) -> Pretrained:
    """Finds a checkpoint, reads its configuration and finds the model's parameters in it.

    `Pretrained.check`, which the caller calls, raises about what is missing, unexpected or misshapen.

    Args:
        name_or_path: a directory, or the name of a model on the hub.
        architecture: the class to load, by its name in PyTorch.
        config: a configuration instead of the checkpoint's own, or where to find one.
        dtype: to load in (in Flax, to compute in): a dtype of any framework, its name, or "auto";
            float32 by default.
        torch_dtype: the same, by its older name.
        ignore_mismatched_sizes: tensors of another shape keep their initial values.
        output_loading_info: the caller takes the report of missing and unexpected tensors itself.
        options: where to look (revision, subfolder, token, cache_dir, local_files_only,
            force_download), which files to take where there are several (from_pt, from_tf,
            from_flax), and fields of the configuration to override.

    Raises:
        HubError: nothing found under that name.
        ConfigError: an invalid configuration.
        InputError: an option that does not exist.
        CheckpointError: not an OPT checkpoint, or others keep writing to the directory.
        FormatError: a damaged or unsafe file.
    """
    hub = take_hub_options(options)
    prefer = next((name for hint, name in PREFERRED.items() if options.pop(hint, False)), None)
    _check_overrides(options)
    if None not in (dtype, torch_dtype) and dtype != torch_dtype:
        raise InputError(f"dtype={dtype!r} and torch_dtype={torch_dtype!r} differ: give one.")
    dtype = dtype if torch_dtype is None else torch_dtype
    directory = resolve(name_or_path, prefer=prefer, **hub)
    options["_name_or_path"] = str(name_or_path)

    def read(stack: ExitStack) -> tuple[CheckpointReader, OPTConfig, GenerationConfig]:
        reader = stack.enter_context(closing(open_weights(directory, prefer)))
        found = find_config(config, directory, reader, **options)
        if found is None:
            raise ConfigError(f"{directory} holds no {CONFIG_NAME}. Is it a model directory?")
        settings = GenerationConfig.from_model_config(found)
        if (directory / GENERATION_CONFIG_NAME).is_file():
            own = GenerationConfig.from_json_file(directory / GENERATION_CONFIG_NAME)
            given = {name: options[name] for name in SPECIAL_TOKENS if name in options}
            settings = own.replace(**given).following(found)
        return reader, found, settings

    reader, own_config, generation_config = read_together(directory, read)
    with ExitStack() as stack:  # closes the files if the checkpoint does not fit
        stack.callback(reader.close)
        if architecture == "OPTForCausalLM":
            own_config = _as_tied(own_config, reader, name_or_path)
        sources, report = match(own_config, architecture, reader)
        name = resolve_dtype(dtype, own_config, reader)
        stored_dtype = resolve_dtype("auto", own_config, reader)
        own_config.torch_dtype = name
        stack.pop_all()
    return Pretrained(
        own_config,
        generation_config,
        name,
        not (dtype is None or (isinstance(dtype, str) and dtype == "auto")),
        stored_dtype,
        reader,
        sources,
        report,
        str(name_or_path),
        ignore_mismatched_sizes,
        output_loading_info,
    )


def _as_tied(config: OPTConfig, reader: CheckpointReader, where: object) -> OPTConfig:
    """The configuration, untied if the checkpoint has a head that is not the embedding."""
    head = separate_head(config, reader)
    if head is None:
        return config
    warnings.warn(
        f"{where}: tie_word_embeddings says that the head is the embedding, but {head} holds other "
        "values: loaded as a head of its own, and tie_word_embeddings set to False. Write False into "
        "config.json, or remove the tensor.",
        stacklevel=4,
    )
    return config.replace(tie_word_embeddings=False)


def _check_overrides(overrides: dict[str, Any]) -> None:
    if overrides.pop("mmap", False):
        raise InputError(
            "mmap=True: expected a model of PyTorch, the only one whose weights may stay in their "
            "files; TensorFlow and JAX have them in memory of their own. Leave mmap out."
        )
    for name in overrides:
        if name not in (*FIELDS, "num_labels") or name == "extra":
            known = [*FIELDS, *HUB_OPTIONS, "dtype", "num_labels", "attn_implementation"]
            hint = did_you_mean(name, known)
            raise InputError(f"from_pretrained has no option {name!r}.{hint}")


def save_pretrained(
    directory: str | os.PathLike[str],
    config: OPTConfig,
    generation_config: GenerationConfig,
    architecture: str,
    tensors: Iterable[tuple[Param, np.dtype[Any], Callable[[], np.ndarray]]],
    *,
    own_format: str,
    added: Iterable[Added] = (),
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
) -> None:
    """Writes a model in the one canonical spelling, whatever framework it comes from.

    Args:
        directory: made if need be; a former checkpoint in it is replaced when all is written.
        tensors: each parameter in table order, its dtype, and a function that gives its values in
            canonical layout; called one at a time.
        own_format: the framework's own format, written if not `safe_serialization`.
        added: what modules of the user's hold beyond the table.
        max_shard_size: bytes, or such as "5GB"; a larger model is written as shards with an index.
        safe_serialization: safetensors, which every framework here reads.

    Raises:
        InputError: a size that cannot be read.
        OSError: the directory cannot be written; what was there before stays.
    """
    directory = Path(directory)
    format = FORMATS[DEFAULT_FORMAT if safe_serialization else own_format]
    outgoing = [
        Outgoing(param, dtype, partial(_in_memory, param, read)) for param, dtype, read in tensors
    ]
    dtype = str(outgoing[0].dtype)
    with staged(directory, obsolete=partial(shadows, format.layout)) as folder:
        everything: list[Outgoing | Added] = [*outgoing, *added]
        write_weights(folder, everything, format, architecture, max_shard_size=max_shard_size)
        config.replace(architectures=[architecture], torch_dtype=dtype).save_pretrained(folder)
        generation_config.updated(config).save_pretrained(folder)


def _in_memory(param: Param, read: Callable[[], np.ndarray]) -> Source:
    return Source(param, LazyTensor.from_array(param.name, read()), transposed=False)


__all__ = ["CONFIG_NAME", "Pretrained", "open_pretrained", "save_pretrained"]
