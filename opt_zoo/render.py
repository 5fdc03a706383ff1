# SPDX-License-Identifier: Apache-2.0
"""Tables for people; each function takes what a command found and gives something rich can print."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from conversion import Conversion
from opt_zoo.backends import BACKENDS
from opt_zoo.demo import Answer, Difference
from opt_zoo.inspection import Inspection


def printable(text: str, keep: str = "") -> str:
    """The text with escapes for what a terminal would act on or not show, but for `keep`."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def size(nbytes: float) -> str:
    """Bytes as people read them: 1.3 GB (10**9)."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table whose columns but the first are numbers, and so to the right."""
    result = Table(
        title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for index, column in enumerate(columns):
        justify: JustifyMethod = "right" if index else "left"
        result.add_column(column, justify=justify, header_style="dim", overflow="fold")
    return result


def answer_texts(prompts: Sequence[str], answer: Answer) -> RenderableType:
    """What one framework said to each prompt."""
    lines = [Text(BACKENDS[answer.framework].title, style="bold")]
    for prompt, text in zip(prompts, answer.texts, strict=True):
        lines.append(Text.assemble("  ", (_lines(prompt), "dim"), (_lines(text), "green")))
    return Group(*lines)


def answer_figures(answers: Sequence[Answer]) -> Table:
    """Seconds, speed and memory, one framework a row."""
    result = table(
        "framework", "load s", "first run s", "tokens/s, best of several runs", "peak memory"
    )
    for a in answers:
        result.add_row(
            BACKENDS[a.framework].title,
            f"{a.load_seconds:.2f}",
            f"{a.first_seconds:.2f}",
            f"{a.tokens_per_second:.0f}",
            size(a.peak_bytes),
        )
    return result


def difference_figures(differences: Sequence[Difference]) -> Table:
    """The largest difference of the logits, one pair a row."""
    result = table("largest difference of logits", "absolute", "relative", "greedy tokens")
    for d in differences:
        names = f"{BACKENDS[d.first].title} - {BACKENDS[d.second].title}"
        same = Text("equal", "green") if d.same_tokens else Text("DIFFERENT", "bold red")
        result.add_row(names, f"{d.absolute:.1e}", f"{d.relative:.1e}", same)
    return result


def demo_figures(answers: Sequence[Answer], differences: Sequence[Difference]) -> Group:
    """The tables below the texts."""
    figures: list[RenderableType] = ["", answer_figures(answers)]
    if differences:
        figures += ["", difference_figures(differences)]
    return Group(*figures)


def inspection(found: Inspection) -> RenderableType:
    """All of an inspection: files, configuration, tensors, and what does not fit."""
    head = table("", "")
    head.show_header = False
    head.add_row("directory", _plain(found.directory))
    for name, nbytes in found.files.items():
        head.add_row(found.format, _plain(f"{name}  {size(nbytes)}"))
    dtypes = ", ".join(f"{count} {name}" for name, count in found.dtypes.items())
    head.add_row("tensors", f"{len(found.tensors)} ({dtypes})")
    head.add_row("parameters", f"{found.num_parameters:,}")
    head.add_row("architecture", _plain(_guess(found.architecture or "unknown", found.assumption)))
    for name, value in (found.config or {}).items():
        head.add_row(name, _plain(str(value)))
    tensors = table("tensor", "dtype", "shape", "size")
    for name, dtype, shape, nbytes in found.tensors:
        tensors.add_row(_plain(name), dtype, str(shape), size(nbytes))
    return Group(head, "", tensors, "", *_verdict(found))


def conversion(done: Conversion) -> str:
    """One line about what was written."""
    architecture = _guess(done.architecture, done.assumption)
    target = printable(str(done.target))
    return f"{target}: {done.tensors} tensors, {size(done.nbytes)}, {printable(architecture)}"


def _guess(architecture: str, assumption: str | None) -> str:
    return f"{architecture} ({assumption})" if assumption else architecture


def _plain(text: str, style: str = "") -> Text:
    return Text(printable(text), style, overflow="fold")


def _lines(text: str) -> str:
    return printable(text, keep="\n")


def _verdict(found: Inspection) -> list[Text]:
    if found.fits:
        return [
            Text("Every tensor that the configuration asks for is there, and no other.", "green")
        ]
    lines = [_plain(found.problem, "red")] if found.problem else []
    for what in ("missing", "unexpected", "mismatched"):
        lines += [_plain(f"{what}: {entry}", "red") for entry in getattr(found, what)]
    return lines
