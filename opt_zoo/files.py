# SPDX-License-Identifier: Apache-2.0
"""The parts of the command that are about files: inspect, convert, verify."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import typer

import conversion
from conversion import Plan
from conversion.text import conversion_line, conversion_to_dict, plan_to_dict, plan_warnings
from opt_core.errors import InputError
from opt_core.formats import DEFAULT_FORMAT
from opt_zoo import options, render, verification
from opt_zoo.demo import DEFAULT_PROMPTS
from opt_zoo.inspection import inspect_checkpoint
from opt_zoo.terminal import bytes_progress, out, say, worker_progress
from opt_zoo.verification import Verification

DIFFERENT = 1  # exit code


def inspect(path: options.Path, as_json: options.AsJson = False) -> None:
    """Show what a checkpoint holds, and what is missing.

    Of its weights it reads the headers, and a head that is stored beside the embedding it is tied to.
    Exits with 1 if a file is damaged or the tensors do not fit the configuration; what can be read
    is shown all the same.
    """
    found = inspect_checkpoint(path)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        out.print(render.inspection(found))
    if not found.fits:
        raise typer.Exit(DIFFERENT)


def convert(
    source: options.Source,
    target: options.Target,
    to: options.To = DEFAULT_FORMAT,
    dtype: options.TargetDtype = None,
    max_shard_size: options.MaxShardSize = "5GB",
    architecture: options.Architecture = None,
    config: options.Config = None,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    verify: options.Verify = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Write any readable checkpoint in another format, one tensor in memory at a time.

    Tokenizer and generation files come along. The target appears whole or not at all.
    """
    chosen: dict[str, Any] = {
        "to": to,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "architecture": architecture,
        "config": config,
    }
    if dry_run:
        planned = conversion.plan(source, **chosen)
        _warn(planned)
        if as_json:
            print(json.dumps(plan_to_dict(planned), indent=2))
        else:
            out.print(render.plan(planned))
        return
    with bytes_progress("converting") as progress:
        done = conversion.convert(
            source,
            target,
            overwrite=overwrite,
            resume=resume,
            verify=verify,
            progress=progress,
            **chosen,
        )
    _warn(done.plan)
    print(json.dumps(conversion_to_dict(done), indent=2) if as_json else conversion_line(done))


def verify(
    first: options.First,
    second: options.Second,
    logits: options.Logits = False,
    framework: options.LogitsFrameworks = None,
    prompt: options.LogitsPrompt = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor, whatever formats they are in.

    Exits with 1 unless all are bit-equal and in the same dtype. With --logits tensors in another
    dtype may differ, as long as every framework continues the prompts alike with both.
    """
    if not logits and (framework or prompt):
        raise InputError("--framework and --prompt: expected --logits with them.")
    if logits:
        verification.check_runnable(first, second)
        names = options.frameworks(framework)
        prompts = verification.encode(first, second, prompt or DEFAULT_PROMPTS)
    with bytes_progress("comparing") as progress:
        found = Verification(conversion.compare(first, second, progress=progress))
    if logits:
        found = replace(
            found,
            prompts=prompts[0].texts,
            logits=tuple(
                verification.compare_logits(name, *prompts, worker_progress) for name in names
            ),
        )
    if as_json:
        print(json.dumps(verification.to_dict(found), indent=2))
    else:
        out.print(render.verification(found))
    if not found.passed:
        say("The checkpoints differ.", style="bold red")
        raise typer.Exit(DIFFERENT)


def _warn(plan: Plan) -> None:
    for line in plan_warnings(plan):
        say(line, style="yellow")
