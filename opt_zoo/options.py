# SPDX-License-Identifier: Apache-2.0
"""The options and arguments of the commands, each with its help."""

from __future__ import annotations

from typing import Annotated

import typer

from opt_core.assets import TINY_SUMS
from opt_core.dtypes import MODEL_DTYPES
from opt_zoo.backends import Framework

DTYPES = ", ".join(MODEL_DTYPES)
SOURCE = "Directory, file of weights, or hub name (its weights are downloaded)."

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
Seed = Annotated[int | None, typer.Option(help="Makes drawing repeatable: from 0 to 2**32 - 1.")]
Dtype = Annotated[
    str | None, typer.Option(help=f"{DTYPES}, or auto: as stored.", show_default="float32")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

Path = Annotated[str, typer.Argument(help=SOURCE)]
Source = Annotated[str, typer.Argument(help=SOURCE)]
Target = Annotated[str, typer.Argument(help="Directory to write into.")]
TargetDtype = Annotated[
    str | None, typer.Option("--dtype", help=f"{DTYPES}.", show_default="as stored")
]
MaxShardSize = Annotated[
    str, typer.Option(help="Split the weights into files of at most this size.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the model that is in the target.")
]
