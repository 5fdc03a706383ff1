# SPDX-License-Identifier: Apache-2.0
"""`opt-zoo demo` and `opt-zoo generate`, with PyTorch; the comparison with made-up answers."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from opt_core import CheckpointError, OPTTokenizer, UnsupportedError
from opt_core.assets import sums
from opt_zoo import backends, demo, processes
from opt_zoo.backends import BACKENDS, Framework
from opt_zoo.cli import app
from opt_zoo.demo import DEFAULT_PROMPTS, Answer, compare
from opt_zoo.processes import WorkerError
from opt_zoo.prompts import Prompts
from opt_zoo.worker import Request
from tests.cli.conftest import Runner

TORCH = ("--framework", "torch")


def made_up(framework: Framework, logits: list[float], tokens: tuple[int, ...] = (5, 2)) -> Answer:
    return Answer(framework, ("x",), (tokens,), np.array([logits], np.float32), 1.0, 2.0, 0.5, 10)


def test_differences_are_absolute_and_relative_to_the_largest_logit() -> None:
    answers = [
        made_up(Framework.TORCH, [1.0, -4.0]),
        made_up(Framework.TF, [1.5, -4.0]),
        made_up(Framework.FLAX, [1.0, -5.0], (5, 3)),
    ]
    found = [(d.first, d.second, d.absolute, d.relative, d.same_tokens) for d in compare(answers)]
    assert found == [
        ("torch", "tf", 0.5, 0.125, True),
        ("torch", "flax", 1.0, 0.2, False),
        ("tf", "flax", 1.0, 0.2, False),
    ]
    assert answers[0].tokens_per_second == 4.0


def test_default_prompts_were_held_out() -> None:
    held_out = dict(sums.problems("test"))
    assert all(prompt in held_out for prompt in DEFAULT_PROMPTS)


def test_demo_with_one_framework(opt_zoo: Runner, model: Path) -> None:
    done = opt_zoo("demo", "--model", str(model), *TORCH, "--max-new-tokens", "3")
    assert done.exit_code == 0, done.output
    assert "PyTorch" in done.stdout and DEFAULT_PROMPTS[0] in done.stdout
    assert "tokens/s" in done.stdout
    assert "nothing was compared" in done.stderr


def test_demo_json(opt_zoo: Runner, model: Path) -> None:
    prompts = ("--prompt", "one plus", "--prompt", "two minus forty is")
    done = opt_zoo("demo", "--model", str(model), *TORCH, *prompts, "--json")
    found = json.loads(done.stdout)
    assert found["prompts"] == ["one plus", "two minus forty is"]
    (answer,) = found["answers"]
    assert answer["framework"] == "torch" and len(answer["tokens"]) == 2
    assert answer["load_seconds"] > 0 and answer["tokens_per_second"] > 0
    assert answer["peak_bytes"] > 50e6


def test_different_tokens_are_exit_code_1(
    opt_zoo: Runner, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = iter([(5, 2), (6, 2)])

    def answer(name: Framework, *_: object, **__: object) -> Answer:
        return dataclasses.replace(made_up(name, [1.0], next(tokens)), texts=("a", "b", "c"))

    monkeypatch.setattr(demo, "answer", answer)
    done = opt_zoo("demo", "--model", str(model), *TORCH, "--framework", "tf")
    assert done.exit_code == 1
    assert "DIFFERENT" in done.stdout and "greedy tokens differ" in done.stderr


def test_a_framework_that_is_not_installed_is_named(
    opt_zoo: Runner, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (Framework.TF, Framework.FLAX):
        absent = dataclasses.replace(BACKENDS[name], modules=("no_such_module",))
        monkeypatch.setitem(backends.BACKENDS, name, absent)
    advice = "JAX/Flax is not installed: pip install 'opt-zoo[flax]'"
    done = opt_zoo("demo", "--model", str(model), "--max-new-tokens", "1")
    assert done.exit_code == 0
    assert advice in done.stderr and "PyTorch" in done.stdout
    for command in ("demo", "accuracy"):
        asked = opt_zoo(command, *TORCH, "--framework", "flax")
        assert isinstance(asked.exception, UnsupportedError) and str(asked.exception) == advice


def test_help_names_the_embedded_model_and_explains_every_option(opt_zoo: Runner) -> None:
    for command in ("demo", "generate"):
        assert "opt-tiny-sums" in (text := opt_zoo(command, "--help").stdout)
        assert "assets" not in text
    for info in get_command(app).commands.values():
        assert all(parameter.help for parameter in info.params), info.name


def test_generate_from_stdin_equals_the_options(opt_zoo: Runner, model: Path) -> None:
    options = ("--model", str(model), "--max-new-tokens", "4")
    given = opt_zoo("generate", *TORCH, *options, "--prompt", "ten plus ten is")
    piped = opt_zoo("generate", *TORCH, *options, input="ten plus ten is\n\n")
    assert given.exit_code == 0, given.output
    assert given.stdout == piped.stdout and given.stdout.startswith("ten plus ten is")


def test_sampling_options_reach_the_model(opt_zoo: Runner, model: Path) -> None:
    options = ("--prompt", "one", "--do-sample", "--top-k", "20", "--temperature", "2.0", "--json")
    many = ("--num-return-sequences", "3", "--min-new-tokens", "5", "--max-new-tokens", "5")
    first, again, other = (
        opt_zoo("generate", *TORCH, "--model", str(model), *options, *many, "--seed", seed).stdout
        for seed in ("1", "1", "2")
    )
    assert first == again != other
    assert [len(row["tokens"]) for row in json.loads(first)] == [5, 5, 5]


def test_an_error_in_the_worker_keeps_its_class_and_message(model: Path) -> None:
    prompts = Prompts.encode(model, ["one"])
    request = Request(Framework.TORCH, str(model), prompts.inputs, {"max_new_tokens": 1000})
    with pytest.raises(ValueError, match="position table"):
        processes.run(request)


def test_a_worker_that_dies_is_reported_with_what_it_wrote(model: Path) -> None:
    request = Request(Framework.TORCH, str(model), {"input_ids": [[5], [5, 6]]}, {})
    with pytest.raises(WorkerError, match=r"exit code 1(?s:.)*inhomogeneous"):
        processes.run(request)


def test_errors_are_one_message_and_exit_code_2() -> None:
    command = [sys.executable, "-m", "opt_zoo", "demo", "--model", "/no/such/model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: '/no/such/model': expected an existing directory")
    assert "Traceback" not in done.stderr


def test_new_tokens_end_with_the_first_end_of_sequence(model: Path) -> None:
    prompts = Prompts.encode(model, ["one plus one", "two"])
    width = len(prompts.inputs["input_ids"][0])
    assert prompts.inputs["input_ids"][1][0] == OPTTokenizer.from_pretrained(model).pad_token_id
    rows = [[0] * width + [9, 2, 1, 1], [0] * width + [9, 8, 7, 6]]
    assert prompts.new_tokens(rows) == [[9, 2], [9, 8, 7, 6]]


def test_commands_are_those_of_the_readme() -> None:
    names = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert names == {"demo", "generate", "accuracy", "inspect", "convert", "verify"}


def test_checkpoint_errors_cross_the_process(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    prompts = Prompts.encode(model, ["one"])
    with pytest.raises(CheckpointError, match=r"expected one of model\.safetensors"):
        processes.run(Request(Framework.TORCH, str(tmp_path), prompts.inputs, {}))
