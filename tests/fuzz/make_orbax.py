# SPDX-License-Identifier: Apache-2.0
"""Makes orbax.zip beside this file: orbax directories as tensorstore writes them, no two runs alike.

`python -m tests.fuzz.make_orbax` with tensorstore installed. The file is committed since OCDBT draws
the names of its files at random, and the inputs of a fuzzing run must not depend on them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tensorstore

from tests.fuzz.folder_seeds import ORBAX, read_folder

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_ZSTD = {"name": "zstd", "configuration": {"level": 1}}


def _v2(chunks: list[int], compressor: Any) -> dict[str, Any]:
    return {"driver": "zarr", "metadata": {"chunks": chunks, "compressor": compressor}}


def _v3(chunks: list[int], codecs: list[Any]) -> dict[str, Any]:
    grid = {"name": "regular", "configuration": {"chunk_shape": chunks}}
    return {"driver": "zarr3", "metadata": {"chunk_grid": grid, "codecs": codecs}}


def _sharded(chunks: list[int]) -> dict[str, Any]:
    index = [_BYTES, {"name": "crc32c"}]
    inner = {"chunk_shape": chunks, "codecs": [_BYTES, _ZSTD], "index_codecs": index}
    return {"name": "sharding_indexed", "configuration": inner}


PLAIN = _v2([2, 3], None)
#: What an array looks like, and the settings of the database, if there is one.
KINDS: Mapping[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "v2": (PLAIN, None),
    "v2-zstd": (_v2([4, 2], {"id": "zstd"}), None),
    "v3": (_v3([2, 6], [_BYTES]), None),
    "v3-zstd": (_v3([3, 3], [_BYTES, _ZSTD]), None),
    "v3-sharded": (_v3([4, 6], [_sharded([2, 3])]), None),
    "ocdbt": (
        PLAIN,
        {"compression": None, "max_inline_value_bytes": 0, "max_decoded_node_bytes": 300},
    ),
    "ocdbt-inline": (PLAIN, {"compression": None}),
    "ocdbt-zstd": (PLAIN, {"max_inline_value_bytes": 16}),
}


def write(folder: Path, spec: Mapping[str, Any], database: Mapping[str, Any] | None) -> None:
    """Write three arrays, and the names of orbax beside them."""
    names = [f"params.{number}" for number in range(1, 4)]
    for number, name in enumerate(names):
        store: dict[str, Any] = {"driver": "file", "path": f"{folder}/{name}/"}
        if database is not None:
            base = {"driver": "file", "path": f"{folder}/"}
            store = {"driver": "ocdbt", "base": base, "config": database, "path": f"{name}/"}
        array = np.full((4, 6), 1 + number, np.float32)
        tensorstore.open(
            {**spec, "kvstore": store}, dtype=array.dtype, shape=array.shape, create=True
        ).result().write(array).result()
    entries = {
        name: {
            "key_metadata": [{"key": key, "key_type": 2} for key in name.split(".")],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
        for name in names
    }
    content = {"tree_metadata": entries, "custom_metadata": {"a": "b"}}
    (folder / "_METADATA").write_text(json.dumps(content))


def main() -> None:
    """Write all kinds into one archive."""
    with zipfile.ZipFile(ORBAX, "w", zipfile.ZIP_DEFLATED) as archive:
        for kind, (spec, database) in KINDS.items():
            with TemporaryDirectory() as folder:
                write(Path(folder), spec, database)
                for name, data in read_folder(Path(folder)).items():
                    info = zipfile.ZipInfo(f"{kind}/{name}")
                    archive.writestr(info, data, zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main()
