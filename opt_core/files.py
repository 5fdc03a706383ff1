# SPDX-License-Identifier: Apache-2.0
"""Small file habits of configs and checkpoints: write beside and rename, read JSON strictly."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from opt_core.errors import FormatError

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
"""What stands beside the weights of a model."""

JSON_LIMIT = 100_000_000
"""Bytes: no configuration, index or header of a real model comes near this."""

FileState = tuple[int, int, int, int]
"""What tells that a file is the same and was not written to: device, inode, size, time in ns."""

_MAX_NAME = 255  # bytes: where most systems end


def hidden_sibling(path: Path) -> Path:
    """Return a fresh hidden name beside `path`, so that a rename never crosses disks."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def sync_file(file: IO[bytes]) -> None:
    """Push what was written to `file` through to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Push the renames in `directory` through to the disk, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_state(place: Path | int) -> FileState:
    """Return the state of the file at a path or behind a descriptor; raises OSError."""
    status = os.stat(place)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def plain_name(name: Any) -> bool:
    """Whether `name` is the name of a file on any system: no path, no drive, not empty or endless."""
    return (
        isinstance(name, str)
        and len(name.encode(errors="replace")) <= _MAX_NAME
        and name not in ("", ".", "..")
        and "\0" not in name
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
    )


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write `content` (a string as UTF-8) so that `path` holds all of it or what it held before.

    Raises OSError as `open` and `os.replace` do; no temporary file stays behind.
    """
    path = Path(path)
    temporary = hidden_sibling(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            sync_file(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def check_link(path: Path, folder: Path) -> None:
    """Raise FormatError if `path`, found in `folder`, is a link to somewhere else.

    Links into the hub's cache of the folder itself are its way to keep files.
    """
    if not path.is_symlink():
        return
    snapshots = next(
        (above for above in folder.absolute().parents if above.name == "snapshots"), None
    )
    homes = [folder.resolve(), *([snapshots.with_name("blobs").resolve()] if snapshots else [])]
    target = path.resolve()
    if not any(target.is_relative_to(home) for home in homes) or not target.is_file():
        raise FormatError(
            f"{path}: expected a file in the checkpoint's own folder, found a link to {target}. "
            "Nothing was read from there; do not trust this checkpoint."
        )


def in_hub_cache(path: Path) -> bool:
    """Whether a file lies in the hub's cache, in which none is rewritten: each has its own name."""
    blobs = path.resolve().parent
    return blobs.name == "blobs" and (blobs.parent / "snapshots").is_dir()


def read_text_file(path: Path) -> bytes:
    """Return what stands in a small file beside the weights.

    Raises FormatError for a link that leads elsewhere, and for a file that is too large.
    """
    check_link(path, path.parent)
    size = path.stat().st_size
    if not path.is_file() or size > JSON_LIMIT:
        raise FormatError(
            f"{path}: expected a file of at most {JSON_LIMIT} bytes, found {size}. Is it damaged?"
        )
    return path.read_bytes()


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse `data` as one JSON object in UTF-8 whose keys differ; `where` names it in messages.

    Raises FormatError for anything else: broken UTF-8 or JSON, NaN, a key twice, endless nesting.
    """
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_distinct_pairs, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{where}: expected a JSON object, found text that cannot be read as one ({error}). "
            "The file is damaged or its download incomplete: fetch it again."
        ) from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, found a {type(value).__name__}.")
    return value


def _distinct_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    texts = [*result, *(value for value in result.values() if isinstance(value, str))]
    "".join(texts).encode()  # half a surrogate pair is no text: UnicodeEncodeError, a ValueError
    if len(result) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
