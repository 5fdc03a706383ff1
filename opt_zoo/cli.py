# SPDX-License-Identifier: Apache-2.0
"""The commands and their options; what they do is elsewhere."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TransferSpeedColumn,
)

import conversion
from opt_core import __version__
from opt_core.assets import TINY_SUMS
from opt_core.errors import FormatError, OPTError, UnsupportedError
from opt_zoo import accuracy as accuracies
from opt_zoo import demo as demos
from opt_zoo import processes, render
from opt_zoo.backends import BACKENDS, Framework
from opt_zoo.inspection import inspect as inspect_checkpoint
from opt_zoo.processes import OnEvent
from opt_zoo.worker import Request

DIFFERENT = 1  # exit codes
ERROR = 2

app = typer.Typer(
    name="opt-zoo",
    help="Meta's OPT language models in PyTorch, TensorFlow and JAX: one checkpoint, one answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Option(help="Directory or hub name; by default the embedded model.")]
Prompt = Annotated[list[str] | None, typer.Option(help="A text to continue; may be repeated.")]
Frameworks = Annotated[
    list[Framework] | None, typer.Option("--framework", help="May be repeated; default: all.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The most tokens added to each prompt.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32 (default), float16, bfloat16 or auto: as stored.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def main() -> None:
    """Runs the command; what opt-zoo finds wrong ends it with one message and exit code 2."""
    try:
        app()
    except (OPTError, OSError) as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(ERROR)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"opt-zoo {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def demo(
    model: Model = str(TINY_SUMS),
    prompt: Prompt = None,
    framework: Frameworks = None,
    max_new_tokens: MaxNewTokens = 16,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Answer prompts greedily in each framework, and compare the answers.

    Exits with 1 if the frameworks' tokens differ. One that is not installed is named and left out.
    """
    directory, prompts = demos.encode(model, prompt or demos.DEFAULT_PROMPTS)
    answers = []
    for name in _installed(framework):
        with _progress(BACKENDS[name].title) as on_event:
            answers.append(
                demos.answer(
                    name,
                    directory,
                    prompts,
                    max_new_tokens=max_new_tokens,
                    dtype=dtype,
                    on_event=on_event,
                )
            )
        if not as_json:
            out.print(render.answer_texts(prompts.texts, answers[-1]), soft_wrap=True)
    differences = demos.compare(answers)
    if as_json:
        print(json.dumps(demos.to_dict(prompts, answers, differences), indent=2))
    else:
        out.print()
        out.print(render.answer_figures(answers))
        if differences:
            out.print()
            out.print(render.difference_figures(differences))
    if not differences:
        err.print("Only one framework answered, so nothing was compared.")
    if any(not difference.same_tokens for difference in differences):
        err.print("The frameworks' greedy tokens differ.", style="bold red")
        raise typer.Exit(DIFFERENT)


@app.command()
def generate(
    framework: Annotated[Framework, typer.Option(help="Which backend runs the model.")],
    model: Model = str(TINY_SUMS),
    prompt: Annotated[
        list[str] | None, typer.Option(help="May be repeated; default: the lines of stdin.")
    ] = None,
    max_new_tokens: MaxNewTokens = 32,
    min_new_tokens: Annotated[int | None, typer.Option(min=0)] = None,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Draw instead of greedy.")] = False,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    num_return_sequences: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts with one framework."""
    texts = prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    chosen = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "do_sample": do_sample or None,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "num_return_sequences": num_return_sequences,
        "seed": seed,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    directory, prompts = demos.encode(model, texts)
    (name,) = _installed([framework])
    request = Request(name, str(directory), prompts.inputs, given, dtype=dtype)
    with _progress(BACKENDS[name].title) as on_event:
        reply = processes.run(request, on_event)
    tokens = prompts.new_tokens(reply.sequences)
    each = num_return_sequences or 1
    rows = [
        {"prompt": prompts.texts[index // each], "text": text, "tokens": row}
        for index, (text, row) in enumerate(zip(prompts.decode(tokens), tokens, strict=True))
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['prompt']}{row['text']}")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Directory, file of weights, or hub name.")],
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds, and what is missing; reads headers only.

    Exits with 1 if a file is damaged or the tensors do not fit the configuration.
    """
    try:
        found = inspect_checkpoint(path)
    except FormatError as error:
        err.print(f"damaged: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(DIFFERENT) from error
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "fits": found.fits}, indent=2))
    else:
        out.print(render.inspection(found))
    if not found.fits:
        raise typer.Exit(DIFFERENT)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Directory, file of weights, or hub name.")],
    target: Annotated[str, typer.Argument(help="Directory to write into.")],
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Split files beyond this size.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write any readable checkpoint as canonical safetensors, one tensor in memory at a time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        bar = bars.add_task("converting", total=None)
        done = conversion.convert(
            source,
            target,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=lambda written, total: bars.update(bar, completed=written, total=total),
        )
    print(f"{done.target}: {done.tensors} tensors, {render.size(done.nbytes)}, {done.architecture}")


@app.command()
def accuracy(framework: Frameworks = None, as_json: AsJson = False) -> None:
    """Let the embedded model answer every held-out sum and difference in each framework."""
    shares: dict[str, float] = {}
    for name in _installed(framework):
        with _progress(BACKENDS[name].title) as on_event:
            shares[name] = accuracies.accuracy(name, on_event)
        if not as_json:
            print(f"{BACKENDS[name].title:<12} {shares[name]:.4%} of {accuracies.count()} held out")
    if as_json:
        print(json.dumps({"problems": accuracies.count(), "accuracy": shares}, indent=2))
    if len(set(shares.values())) > 1:
        err.print("The frameworks' accuracies differ.", style="bold red")
        raise typer.Exit(DIFFERENT)


def _installed(wanted: Sequence[Framework] | None) -> list[Framework]:
    """Those of the frameworks that are installed; the others are named on stderr.

    Raises UnsupportedError where none is.
    """
    names = list(dict.fromkeys(wanted or Framework))
    missing = [name for name in names if BACKENDS[name].missing()]
    advice = [BACKENDS[name].advice() for name in missing]
    if len(missing) == len(names):
        raise UnsupportedError("\n".join(advice))
    for line in advice:
        err.print(line, markup=False, soft_wrap=True)
    return [name for name in names if name not in missing]


@contextmanager
def _progress(title: str) -> Iterator[OnEvent]:
    """Shows a worker's stages and progress on stderr while it runs."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TaskProgressColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        bar = bars.add_task(title, total=None)

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "stage":
                bars.update(bar, description=f"{title}: {event['name']}")
            else:
                bars.update(bar, completed=event["done"], total=event["total"])

        yield on_event
