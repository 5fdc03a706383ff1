# SPDX-License-Identifier: Apache-2.0
"""House rules that no linter knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.definitions import BACKENDS, PACKAGES, ROOT, sources, tree

SPDX = "# SPDX-License-Identifier: Apache-2.0"
EVERYWHERE = (*PACKAGES, "tests", "benchmarks", "examples")
LIBRARY = [file for package in PACKAGES for file in sources(package)]

#: The places that spell parameter names.
SPELLERS = {"opt_core/params.py", "opt_core/dialects.py"}
PARAMETER = re.compile(
    r"\b(\w+_proj|fc[12]|embed_tokens|embed_positions|project_(in|out)|\w*layer_norm|lm_head|score"
    r"|qa_outputs)[./](weight|bias|kernel|embeddings?|scale|gamma|beta)\b|decoder[./]layers\b"
)

#: What a reader must know of OPT is said in the same words wherever it is done.
CANONICAL = (
    "Two rows stand before position 0: pads (-1) read row 1, none reads row 0.",
    "Positions count a row's real tokens, so padding on the left shifts none.",
    "opt-350m has narrower word embeddings, projected to the hidden size and back.",
    "No final norm in a post-norm model, nor where `_remove_final_layer_norm` says so.",
    "opt-350m is post-norm: it normalises after each residual sum; all other sizes before.",
    "The query is scaled after its bias and before the product.",
    "Softmax in float32 whenever the activations have 16 bits.",
    "The lowest finite number, not -inf: a row in which every key is masked stays finite.",
    "Sampling is argmax(scores + noise) with Gumbel noise.",
    "the tied head counted once",
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def strings(path: Path) -> Iterator[tuple[str, int]]:
    """Every string of a file but its docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree(path))
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree(path)):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.value, node.lineno


@pytest.mark.parametrize("folder", EVERYWHERE)
def test_the_first_line_names_the_licence(folder: str) -> None:
    files = sources(folder)
    assert [relative(f) for f in files if f.read_text().split("\n")[0] != SPDX] == []


def test_parameters_are_named_in_one_place() -> None:
    found = [
        f"{relative(path)}:{line}: {text[:60]!r}"
        for path in LIBRARY
        if relative(path) not in SPELLERS
        for text, line in strings(path)
        if PARAMETER.search(text)
    ]
    assert found == []


def test_the_pattern_finds_parameter_names() -> None:
    """The test above could not fail if this did not hold."""
    for name in ("model.decoder.layers.0.fc1.weight", "lm_head.weight", "q_proj/kernel"):
        assert PARAMETER.search(name)
    for name in ("q_proj", "layers.", "fc1", "final_layer_norm", "embed_tokens"):
        assert not PARAMETER.search(name)


def test_nothing_asks_whether_a_config_has_a_field() -> None:
    found = []
    for path in LIBRARY:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in (
                "getattr",
                "hasattr",
                "setattr",
            ):
                continue
            if ast.unparse(node.args[0]).split(".")[-1].removesuffix("_").endswith("config"):
                found.append(f"{relative(path)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []


def test_the_library_asserts_nothing() -> None:
    """An assert vanishes under -O and teaches the caller nothing."""
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in LIBRARY
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def prose(package: str) -> str:
    """All of a package's text on one line, without the marks of comments."""
    text = "\n".join(path.read_text() for path in sources(package))
    return re.sub(r"\s*\n\s*(# ?)?", " ", text)


@pytest.mark.parametrize("package", BACKENDS.values())
@pytest.mark.parametrize("sentence", CANONICAL)
def test_the_quirks_are_told_in_the_same_words(package: str, sentence: str) -> None:
    assert sentence in prose(package)
