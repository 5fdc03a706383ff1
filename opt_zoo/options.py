# SPDX-License-Identifier: Apache-2.0
"""The options and arguments of the commands, each with its help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from opt_core.assets import TINY_SUMS
from opt_core.dtypes import MODEL_DTYPES
from opt_core.errors import UnsupportedError
from opt_core.formats import FORMATS
from opt_core.generation.strategies import GenerationMode
from opt_core.params import ARCHITECTURES
from opt_zoo.backends import BACKENDS, Framework
from opt_zoo.terminal import say

DTYPES = ", ".join(MODEL_DTYPES)
SOURCE = "Directory, file of weights, index of several, or hub name (its weights are downloaded)."
TITLES = "; ".join(f"{name}: {format.title}" for name, format in FORMATS.items())

Model = Annotated[str, typer.Option(help="Directory or hub name.", show_default=TINY_SUMS.name)]
DemoPrompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="A text to continue; may be repeated; default: three problems."),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(help="A text to continue; may be repeated; default: the lines of stdin."),
]
Frameworks = Annotated[
    list[Framework] | None,
    typer.Option("--framework", help="May be repeated; default: all that are installed."),
]
OneFramework = Annotated[Framework, typer.Option("--framework", help="What runs the model.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The most tokens added to each prompt.")]
MinNewTokens = Annotated[
    int | None, typer.Option(min=0, help="No end of sequence before so many new tokens.")
]
DoSample = Annotated[
    bool, typer.Option("--do-sample", help="Draw each token instead of taking the likeliest.")
]
Temperature = Annotated[
    float | None, typer.Option(help="Divides the logits before drawing; below 1 is safer.")
]
TopK = Annotated[int | None, typer.Option(help="Draw among so many of the likeliest tokens only.")]
TopP = Annotated[
    float | None,
    typer.Option(help="Draw among the likeliest tokens that together have this probability."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1, tokens that stand there already are less likely.")
]
NumReturnSequences = Annotated[
    int | None, typer.Option(min=1, help="Continuations drawn for each prompt.")
]
Strategy = Annotated[
    GenerationMode | None,
    typer.Option(help="How tokens are chosen.", show_default="as the other options say"),
]
Option = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Any other option of generate, its value in JSON, such as num_beams=4; may be repeated.",
    ),
]
ForceWord = Annotated[
    list[str] | None,
    typer.Option(help="Words that must appear, for constrained-beam; may be repeated."),
]
Stop = Annotated[
    list[str] | None, typer.Option(help="End where this text appears; may be repeated.")
]
Assistant = Annotated[
    str | None,
    typer.Option(help="A smaller model of the same tokens that proposes: directory or hub name."),
]
Stream = Annotated[
    bool, typer.Option("--stream", help="Print the text while it is made; one prompt, no beams.")
]
Stats = Annotated[
    bool,
    typer.Option("--stats", help="Say on stderr what it took: seconds, tokens/s, memory."),
]
Seed = Annotated[int | None, typer.Option(help="Makes drawing repeatable: from 0 to 2**32 - 1.")]
Dtype = Annotated[
    str | None, typer.Option(help=f"{DTYPES}, or auto: as stored.", show_default="float32")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

Path = Annotated[str, typer.Argument(help=SOURCE)]
Source = Annotated[str, typer.Argument(help=SOURCE)]
Target = Annotated[
    str, typer.Argument(help="Directory to write into; with --dry-run it is not looked at.")
]
To = Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"{TITLES}.")]
TargetDtype = Annotated[
    str | None, typer.Option("--dtype", help=f"{DTYPES}.", show_default="as stored")
]
MaxShardSize = Annotated[
    str, typer.Option(help="Split the weights into files of at most this size.")
]
Architecture = Annotated[
    str | None,
    typer.Option(
        help=f"Class of model to write: {', '.join(ARCHITECTURES)}. What it has no place for is "
        "left out.",
        show_default="as config.json says",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        help="Configuration instead of the source's: a file, directory or hub name.",
        show_default="beside the weights",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the model that is in the target.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="After a failure keep the files that are complete; go on with them."
    ),
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="Read all back, and compare, before the target appears."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan, from headers alone; write nothing.")
]

First = Annotated[str, typer.Argument(metavar="A", help=SOURCE)]
Second = Annotated[str, typer.Argument(metavar="B", help="What A is compared with.")]
Logits = Annotated[
    bool, typer.Option("--logits", help="Run both on prompts, too, and compare what they say.")
]
LogitsFrameworks = Annotated[
    list[Framework] | None,
    typer.Option(
        "--framework", help="For --logits; may be repeated; default: all that are installed."
    ),
]
LogitsPrompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="A text for --logits; may be repeated; default: three problems."),
]


def frameworks(wanted: Sequence[Framework] | None) -> list[Framework]:
    """Those asked for; else all that are installed, the others named on stderr.

    Raises UnsupportedError where one asked for is not installed, or none at all is.
    """
    names = list(dict.fromkeys(wanted or Framework))
    missing = [name for name in names if BACKENDS[name].missing()]
    advice = [BACKENDS[name].advice() for name in missing]
    if advice and (wanted or len(missing) == len(names)):
        raise UnsupportedError("\n".join(advice))
    for line in advice:
        say(line)
    return [name for name in names if name not in missing]
