# SPDX-License-Identifier: Apache-2.0
"""Tables for people; each function takes what a command found and gives something rich can print."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from conversion import Plan
from conversion.text import plan_rows, printable, size
from conversion.verify import TensorComparison
from opt_zoo.backends import BACKENDS, Framework
from opt_zoo.demo import Answer, Difference
from opt_zoo.inspection import File, Inspection
from opt_zoo.processes import Reply
from opt_zoo.verification import LogitsComparison, Verification, relative_difference

MOST_ROWS = 20  # of the tensors that differ


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


def statistics(framework: Framework, reply: Reply, tokens: Sequence[Sequence[int]]) -> Table:
    """What one framework took to continue prompts."""
    result = table("framework", "load s", "first run s", "best run s", "tokens/s", "peak memory")
    best = reply.seconds["best run"]
    result.add_row(
        BACKENDS[framework].title,
        f"{reply.seconds['load']:.2f}",
        f"{reply.seconds['first run']:.2f}",
        f"{best:.3f}",
        f"{sum(map(len, tokens)) / best:.0f}",
        size(reply.peak_bytes),
    )
    return result


def difference_figures(differences: Sequence[Difference]) -> Table:
    """The largest difference of the logits, one pair of frameworks a row."""
    names = [f"{BACKENDS[d.first].title} - {BACKENDS[d.second].title}" for d in differences]
    return _logits(names, differences)


def demo_figures(answers: Sequence[Answer], differences: Sequence[Difference]) -> Group:
    """The tables below the texts."""
    figures: list[RenderableType] = ["", answer_figures(answers)]
    if differences:
        figures += ["", difference_figures(differences)]
    return Group(*figures)


def inspection(found: Inspection) -> RenderableType:
    """All of an inspection: files, configuration, tensors, and what does not fit."""
    head = _pairs()
    head.add_row("directory", _plain(found.directory))
    for file in found.files:
        head.add_row(found.container or "unknown", _file(file))
    dtypes = ", ".join(f"{count} {name}" for name, count in found.dtypes.items())
    head.add_row("tensors", f"{len(found.tensors)} ({dtypes or 'none'})")
    head.add_row("parameters", f"{found.num_parameters:,}")
    head.add_row("names", found.dialect or "unknown")
    head.add_row("architecture", _plain(_guess(found.architecture or "unknown", found.assumption)))
    for name, value in (found.config or {}).items():
        head.add_row(name, _plain(str(value)))
    tensors = table("tensor", "dtype", "shape", "size")
    for name, dtype, shape, nbytes in found.tensors:
        tensors.add_row(_plain(name), dtype, str(shape), size(nbytes))
    return Group(head, "", tensors, "", *_verdict(found))


def plan(planned: Plan) -> Table:
    """What a conversion would do."""
    result = _pairs()
    for name, value in plan_rows(planned):
        result.add_row(name, Text(value, overflow="fold"))
    return result


def verification(found: Verification) -> Group:
    """The tensors that differ or that one checkpoint lacks, the logits, and a line that sums up."""
    compared, different = found.tensors, found.different
    parts: list[RenderableType] = []
    if different:
        parts += [_differences(different[:MOST_ROWS]), *_more(different), ""]
    for where, names in (
        (compared.first, compared.only_first),
        (compared.second, compared.only_second),
    ):
        parts += [_plain(f"only in {where}: {name}", "red") for name in names[:MOST_ROWS]]
        parts += _more(names)
    if found.logits:
        parts += [_logits([BACKENDS[f.framework].title for f in found.logits], found.logits), ""]
    total = len(compared.tensors)
    sum_up = f"{total - len(different)} of {total} tensors are bit-equal"
    if found.passed and different:
        sum_up += "; the others are in another dtype, and the tokens are the same"
    return Group(*parts, Text(f"{sum_up}.", "green" if found.passed else ""))


def _differences(tensors: Sequence[TensorComparison]) -> Table:
    result = table("largest difference of tensor", "dtypes", "absolute", "relative")
    for t in tensors:
        dtypes = " / ".join(dict.fromkeys(t.dtypes))
        row = (f"{t.difference:.1e}", f"{relative_difference(t):.1e}")
        result.add_row(_plain(t.name), dtypes, *row)
    return result


def _logits(names: Sequence[str], found: Sequence[Difference | LogitsComparison]) -> Table:
    result = table("largest difference of logits", "absolute", "relative", "greedy tokens")
    for name, f in zip(names, found, strict=True):
        same = Text("equal", "green") if f.same_tokens else Text("DIFFERENT", "bold red")
        result.add_row(name, f"{f.absolute:.1e}", f"{f.relative:.1e}", same)
    return result


def _more(rows: Sequence[object]) -> list[Text]:
    more = len(rows) - MOST_ROWS
    return [Text(f"... and {more} more")] if more > 0 else []


def _file(file: File) -> Text:
    text = _plain(file.name)
    if file.nbytes is not None:
        text.append(f"  {size(file.nbytes)}")
    if file.tensors is None:
        return text.append("  missing" if file.nbytes is None else "  damaged", "red")
    return text.append(f"  {file.tensors} tensors")


def _guess(architecture: str, assumption: str | None) -> str:
    return f"{architecture} ({assumption})" if assumption else architecture


def _pairs() -> Table:
    """A table of names and values."""
    result = table("", "")
    result.show_header = False
    result.columns[1].justify = "left"
    return result


def _plain(text: str, style: str = "") -> Text:
    return Text(printable(text), style, overflow="fold")


def _lines(text: str) -> str:
    return printable(text, keep="\n")


def _verdict(found: Inspection) -> list[Text]:
    if found.fits:
        return [
            Text("Every tensor that the configuration asks for is there, and no other.", "green")
        ]
    problems = [file.problem for file in found.files if file.problem] + list(found.problems)
    lines = [Text(_lines(problem), "red") for problem in dict.fromkeys(problems)]
    for what in ("missing", "unexpected", "mismatched"):
        lines += [_plain(f"{what}: {entry}", "red") for entry in getattr(found, what)]
    return lines
