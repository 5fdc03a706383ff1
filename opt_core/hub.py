# SPDX-License-Identifier: Apache-2.0
"""From a directory or the name of a model on the hub to a directory with its files.

The hub's library is imported where it is needed: it takes a third of a second, and a directory needs none.
"""

from __future__ import annotations

import os
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from opt_core.checkpoints.layouts import Layout, in_order
from opt_core.errors import HubError
from opt_core.files import TEXT_FILES
from opt_core.staging import complete

#: Where a model is looked for: arguments of `resolve`.
HUB_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")
#: Accepted from code written for transformers, and without effect: loading is always lazy, and safe.
HINTS = (
    "low_cpu_mem_usage",
    "mirror",
    "resume_download",
    "trust_remote_code",
    "use_safetensors",
)

_WORD = r"[\w-][\w.-]*"
_NAME = re.compile(f"{_WORD}(/{_WORD})?", re.ASCII)
_FOLDER = re.compile(f"({_WORD}(/{_WORD})*/?)?", re.ASCII)


def take_hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of `resolve` out of those of a `from_pretrained`, and what says nothing here.

    `use_auth_token` is the older name of `token`. None of them is ever a field of a configuration.
    """
    found = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    older = options.pop("use_auth_token", None)
    if found.get("token") is None and older is not None:
        found["token"] = older
    if options.pop("proxies", None):
        warnings.warn(
            "proxies has no effect: set the environment variables HTTP_PROXY and HTTPS_PROXY.",
            stacklevel=4,
        )
    for name in HINTS:
        options.pop(name, None)
    return found


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

    Where a save into a local one was interrupted when all was written, it is completed first.

    From the hub come the configuration, the tokenizer and, with `weights`, the weights of one kind:
    the first in the order of `LAYOUTS` that the model has, those of the framework `prefer` ("pt",
    "tf", "flax") before the others. `local_files_only` looks into the cache and asks no network.
    Raises HubError, which says what was tried and what to do.
    """
    name = os.fspath(name_or_path)
    if not _FOLDER.fullmatch(subfolder):
        raise HubError(f"subfolder: expected a folder inside the model, found {subfolder!r}.")
    local = Path(name).expanduser()
    if name and local.is_dir():
        if not (local / subfolder).is_dir():
            raise HubError(f"{local}: expected a subfolder {subfolder!r}, found none. Check it.")
        complete(local / subfolder)
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
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import LocalEntryNotFoundError

    offline = local_files_only or HF_HUB_OFFLINE
    problem: HubError | None = None
    layouts, commit = in_order(prefer), revision
    for layout in layouts:
        try:
            snapshot = fetch(TEXT_FILES + _patterns(layout), commit)
        except HubError as error:
            if not offline or not isinstance(error.__cause__, LocalEntryNotFoundError):
                raise
            problem = problem or error  # this kind is not whole in the cache, another may be
            continue
        if _holds(snapshot / subfolder, _patterns(layout)):
            return snapshot / subfolder
        commit = snapshot.name  # what the revision is now, should it move meanwhile
    raise problem or HubError(
        f"{_label(name, revision, subfolder)}: expected weights as "
        f"{', '.join(layout.single for layout in layouts)} or in shards, found none of them. Check "
        "the name, the revision and the subfolder"
        f"{', or allow the network to complete the cache' if offline else ''}."
    )


def _patterns(layout: Layout) -> tuple[str, ...]:
    """What the files of a layout are called, with "*" for numbers; the single one may be a folder."""
    shards = re.sub(r"\{.*?\}", "*", layout.shard)
    names = (layout.single, f"{layout.single}/*", layout.index, shards)
    return tuple(name for name in names if name)


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
    from huggingface_hub import snapshot_download

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
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    match error:
        case errors.GatedRepoError():
            return (
                f"found it on {hub}, but access must be asked for. Accept its terms there, then "
                "set HF_TOKEN or pass token=."
            )
        case errors.RepositoryNotFoundError():
            return (
                f"found neither a directory of this name nor a model on {hub}. Check the name; "
                "for a private model set HF_TOKEN or pass token=."
            )
        case errors.RevisionNotFoundError():
            return (
                f"found the model on {hub}, but not this revision. Check the branch, tag or commit."
            )
        case errors.HFValidationError():
            return f"found no directory of this name, and it is no hub name ({error})."
        case errors.LocalEntryNotFoundError() if local_files_only:
            return (
                "expected it in the cache, as local_files_only asks, found it missing or "
                "incomplete. Check cache_dir or HF_HOME, or allow the network once."
            )
        case errors.LocalEntryNotFoundError():
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
