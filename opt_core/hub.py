# SPDX-License-Identifier: Apache-2.0
"""From a directory or the name of a model on the hub to a directory with its files."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from opt_core.errors import HubError

TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
SAFETENSORS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
TORCH_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")

_WORD = r"[\w-][\w.-]*"
_NAME = re.compile(f"{_WORD}(/{_WORD})?", re.ASCII)
_FOLDER = re.compile(f"({_WORD}(/{_WORD})*/?)?", re.ASCII)


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    weights: bool = True,
    prefer: str | None = None,
) -> Path:
    """Return the directory with a model's files, fetched from the hub unless it is a local one.

    From the hub come the configuration, the tokenizer and, with `weights`, the safetensors files;
    the torch files only where there are none. `local_files_only` looks into the cache and asks no
    network. Raises HubError, which says what was tried and what to do.
    """
    name = os.fspath(name_or_path)
    if not _FOLDER.fullmatch(subfolder):
        raise HubError(f"subfolder: expected a folder inside the model, found {subfolder!r}.")
    local = Path(name).expanduser()
    if name and local.is_dir():
        if not (local / subfolder).is_dir():
            raise HubError(f"{local}: expected a subfolder {subfolder!r}, found none. Check it.")
        return local / subfolder
    if not name or local.exists() or not _NAME.fullmatch(name):
        found = "a file" if name and local.exists() else "neither"
        raise HubError(
            f"{name!r}: expected an existing directory or a hub name such as facebook/opt-125m, "
            f"found {found}. Check the path."
        )
    fetch = partial(
        _fetch,
        name,
        subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    if not weights:
        return fetch(TEXT_FILES, revision) / subfolder
    snapshot = fetch(TEXT_FILES + SAFETENSORS_FILES, revision)
    if not _holds(snapshot / subfolder, SAFETENSORS_FILES):
        snapshot = fetch(TORCH_FILES, snapshot.name)  # a snapshot is named by its commit
        if not _holds(snapshot / subfolder, TORCH_FILES):
            raise HubError(
                f"{_label(name, revision, subfolder)}: expected model.safetensors or "
                f"pytorch_model.bin, whole or in shards, found neither in {snapshot / subfolder}. "
                "Check the name, the revision and the subfolder"
                f"{', or allow the network to complete the cache' if local_files_only else ''}."
            )
    return snapshot / subfolder


def _fetch(
    name: str,
    subfolder: str,
    patterns: tuple[str, ...],
    revision: str | None,
    *,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    force_download: bool,
) -> Path:
    """Return the snapshot that has the files of `patterns`, as far as the model has them."""
    prefix = f"{subfolder.rstrip('/')}/" if subfolder else ""
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[prefix + pattern for pattern in patterns],
            token=token,
            cache_dir=Path(cache_dir) if cache_dir else None,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    except Exception as error:  # the library raises its own, its HTTP client's and the system's
        label = _label(name, revision, subfolder)
        raise HubError(f"{label}: {_explain(error, local_files_only)}") from error
    return Path(folder)


def _label(name: str, revision: str | None, subfolder: str) -> str:
    return (
        name
        + (f" at revision {revision}" if revision else "")
        + (f", subfolder {subfolder}" if subfolder else "")
    )


def _explain(error: Exception, local_files_only: bool) -> str:
    """Say what the hub's library found, and what to do about it."""
    hub = constants.ENDPOINT
    match error:
        case GatedRepoError():
            return (
                f"found it on {hub}, but access must be asked for. Accept its terms there, then "
                "set HF_TOKEN or pass token=."
            )
        case RepositoryNotFoundError():
            return (
                f"found neither a directory of this name nor a model on {hub}. Check the name; "
                "for a private model set HF_TOKEN or pass token=."
            )
        case RevisionNotFoundError():
            return (
                f"found the model on {hub}, but not this revision. Check the branch, tag or commit."
            )
        case HFValidationError():
            return f"found no directory of this name, and it is no hub name ({error})."
        case LocalEntryNotFoundError() if local_files_only:
            return (
                "expected it in the cache, as local_files_only asks, found it missing or "
                "incomplete. Check cache_dir or HF_HOME, or allow the network once."
            )
        case LocalEntryNotFoundError():
            return (
                f"found it not in the cache, and {hub} cannot be reached ({error}). Check the "
                "network, HF_HUB_OFFLINE and HF_ENDPOINT, or give a local directory."
            )
    return (
        f"fetching it from {hub} failed with {type(error).__name__}: {error}. Try again; check "
        "the disk, the network and HF_ENDPOINT, or give a local directory."
    )


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)
