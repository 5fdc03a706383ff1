# SPDX-License-Identifier: Apache-2.0
"""The command, and those of its parts that compare models; `generating.py` and `files.py` have the others."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from opt_core import __version__
from opt_core.assets import TINY_SUMS
from opt_core.errors import OPTError
from opt_zoo import accuracy as accuracies
from opt_zoo import demo as demos
from opt_zoo import options, render
from opt_zoo.backends import BACKENDS
from opt_zoo.files import DIFFERENT, convert, inspect, verify
from opt_zoo.generating import generate
from opt_zoo.prompts import Prompts
from opt_zoo.terminal import out, prepare, say, worker_progress

ERROR = 2  # exit code

app = typer.Typer(
    name="opt-zoo",
    help="Meta's OPT language models in PyTorch, TensorFlow and JAX: one checkpoint, one answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command; what opt-zoo finds wrong ends it with one message and exit code 2."""
    prepare()
    try:
        app()
    except (OPTError, OSError) as error:
        say(f"error: {error}", style="red")
        sys.exit(ERROR)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"opt-zoo {__version__}")
        raise typer.Exit


@app.callback()
def version(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def demo(
    model: options.Model = str(TINY_SUMS),
    prompt: options.DemoPrompt = None,
    framework: options.Frameworks = None,
    max_new_tokens: options.MaxNewTokens = 16,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Answer prompts greedily in each framework, and compare the answers.

    Exits with 1 if the frameworks' tokens differ. By default one that is not installed is named and
    left out.
    """
    names = options.frameworks(framework)
    prompts = Prompts.encode(model, prompt or demos.DEFAULT_PROMPTS)
    answers = []
    for name in names:
        with worker_progress(BACKENDS[name].title) as on_event:
            answers.append(
                demos.answer(
                    name, prompts, max_new_tokens=max_new_tokens, dtype=dtype, on_event=on_event
                )
            )
        if not as_json:
            out.print(render.answer_texts(prompts.texts, answers[-1]), soft_wrap=True)
    differences = demos.compare(answers)
    if as_json:
        print(json.dumps(demos.to_dict(prompts, answers, differences), indent=2))
    else:
        out.print(render.demo_figures(answers, differences))
    if not differences:
        say("Only one framework answered, so nothing was compared.")
    if any(not difference.same_tokens for difference in differences):
        say("The frameworks' greedy tokens differ.", style="bold red")
        raise typer.Exit(DIFFERENT)


@app.command()
def accuracy(framework: options.Frameworks = None, as_json: options.AsJson = False) -> None:
    """Let the embedded model answer every held-out sum and difference in each framework."""
    shares: dict[str, float] = {}
    for name in options.frameworks(framework):
        with worker_progress(BACKENDS[name].title) as on_event:
            shares[name] = accuracies.accuracy(name, on_event)
        if not as_json:
            print(f"{BACKENDS[name].title:<12} {shares[name]:.4%} of {accuracies.count()} held out")
    if as_json:
        print(json.dumps({"problems": accuracies.count(), "accuracy": shares}, indent=2))
    if len(set(shares.values())) > 1:
        say("The frameworks' accuracies differ.", style="bold red")
        raise typer.Exit(DIFFERENT)


for command in (generate, inspect, convert, verify):
    app.command()(command)
