# SPDX-License-Identifier: Apache-2.0
"""Which way imports run: the core knows no framework, and no backend knows another."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.architecture.definitions import BACKENDS, PACKAGES, ROOT, exports, imports, sources

FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "flax"}
#: What each package may import beside the standard library and itself.
ALLOWED: dict[str, set[str]] = {
    "opt_core": {"huggingface_hub", "ml_dtypes", "numpy", "tokenizers"},
    "opt_torch": {"ml_dtypes", "numpy", "opt_core", "torch"},
    "opt_tf": {"keras", "ml_dtypes", "numpy", "opt_core", "optree", "tensorflow"},
    "opt_flax": {"flax", "jax", "ml_dtypes", "numpy", "opt_core"},
    "conversion": {"ml_dtypes", "numpy", "opt_core"},
    "opt_zoo": {"conversion", "numpy", "opt_core", "rich", "typer", *BACKENDS.values()},
}
#: What a single file may import beyond that.
ALLOWED_IN_FILE: dict[str, set[str]] = {
    "opt_core/checkpoints/hdf5_writer.py": {"h5py"},
    "opt_core/checkpoints/zstd.py": {"zstandard"},
    "opt_torch/decoding_weights.py": {"torchao"},
    "opt_torch/flash.py": {"flash_attn"},
    "opt_torch/offload.py": {"accelerate"},
    "opt_zoo/backends.py": FRAMEWORKS,  # runs in a process of its own, which loads one of them
}
OURS = set(PACKAGES)
#: What must not be loaded by importing a package. TensorFlow itself imports jax where it is there.
FORBIDDEN: dict[str, set[str]] = {
    "opt_core": FRAMEWORKS | OURS - {"opt_core"},
    "conversion": FRAMEWORKS | OURS - {"opt_core", "conversion"},
    "opt_torch": FRAMEWORKS - {"torch"} | OURS - {"opt_core", "opt_torch"},
    "opt_tf": {"torch", "flax"} | OURS - {"opt_core", "opt_tf"},
    "opt_flax": FRAMEWORKS - {"jax", "flax"} | OURS - {"opt_core", "opt_flax"},
    "opt_zoo": FRAMEWORKS | set(BACKENDS.values()),
}


def test_every_package_has_its_rules() -> None:
    assert ALLOWED.keys() == FORBIDDEN.keys() == OURS


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_table(package: str) -> None:
    files = sources(package)
    assert files, f"{package} has no source files"
    wrong = []
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        allowed = ALLOWED[package] | ALLOWED_IN_FILE.get(name, set()) | {package}
        wrong += [
            f"{name}:{line}: {module}"
            for module, line in imports(file)
            if module.split(".")[0] not in allowed | sys.stdlib_module_names
        ]
    assert not wrong, wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_loads_no_other_framework(package: str) -> None:
    code = f"import sys, {package}; print(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert package in loaded
    assert not loaded & FORBIDDEN[package]


def test_the_core_loads_quickly_what_it_seldom_needs() -> None:
    """The command line must answer --help at once: no library of the hub or the network at import."""
    code = "import sys, opt_core; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"huggingface_hub", "requests", "httpx", "aiohttp"} & set(done.stdout.split())


@pytest.mark.parametrize("package", ["opt_core", *BACKENDS.values()])
def test_the_public_names_exist(package: str) -> None:
    code = f"import {package} as p; print(*(n for n in p.__all__ if n not in dir(p)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
    assert exports(package) == sorted(exports(package)), "in alphabetical order"
