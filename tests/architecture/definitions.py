# SPDX-License-Identifier: Apache-2.0
"""What a source file defines and imports, read from its syntax tree: nothing is executed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
BACKENDS = {"torch": "opt_torch", "tf": "opt_tf", "flax": "opt_flax"}
PACKAGES = ("opt_core", *BACKENDS.values(), "conversion", "opt_zoo")

#: A framework's own word for a method -> the word in PyTorch.
METHODS = {"call": "forward", "__call__": "forward", "setup": "__init__"}


def sources(package: str) -> list[Path]:
    """Every Python file of a package."""
    return sorted((ROOT / package).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module with its line, those inside functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.module or "", node.lineno


def exports(package: str) -> list[str]:
    """A package's `__all__`."""
    for node in tree(ROOT / package / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{package} has no __all__")


def definitions(path: Path) -> dict[str, tuple[str, ...]]:
    """Functions, classes, constants and methods in order, each with its argument names.

    Under the names that they have in PyTorch: no prefix, `forward`, `__init__`.
    """
    found: dict[str, tuple[str, ...]] = {}
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef):
            name = without_prefix(node.name)
            found[name] = ()
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    found[f"{name}.{METHODS.get(item.name, item.name)}"] = _arguments(item)
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = _arguments(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update({ast.unparse(target): () for target in targets})
    return found


def without_prefix(name: str) -> str:
    return re.sub(r"^(TF|Flax)(?=OPT)", "", name)


def _arguments(node: ast.FunctionDef) -> tuple[str, ...]:
    spec = node.args
    names = [*spec.posonlyargs, *spec.args, spec.vararg, *spec.kwonlyargs, spec.kwarg]
    return tuple(argument.arg for argument in names if argument is not None)
