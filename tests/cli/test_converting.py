# SPDX-License-Identifier: Apache-2.0
"""`opt-zoo convert`, and its plain form `python -m conversion`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.main import get_command

from conversion import cli as plain
from conversion import convert
from opt_core import CheckpointError, InputError, OPTError
from opt_core.formats import FORMATS as WRITABLE
from opt_zoo.cli import app
from tests.cli.conftest import Runner

FORMATS = Path(__file__).parent.parent / "golden" / "formats" / "pre_norm"
SHARDED = str(FORMATS / "bin_sharded")


class Plain:
    """Runs `python -m conversion` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = plain.main(arguments)
        return code, *self.capsys.readouterr()


@pytest.fixture
def module(capsys: pytest.CaptureFixture[str]) -> Plain:
    return Plain(capsys)


def with_config(name: str, target: Path, **changes: object) -> Path:
    """A copy of a golden checkpoint with other values in config.json."""
    shutil.copytree(FORMATS / name, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.mark.parametrize("to", WRITABLE)
def test_every_format(opt_zoo: Runner, to: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    done = opt_zoo("convert", SHARDED, str(target), "--to", to, "--verify", "--json")
    assert done.exit_code == 0 and done.stderr == "", done.output
    told = json.loads(done.stdout)
    assert (told["to"], told["target"], told["verified"]) == (to, str(target), True)
    assert told["tensors"] == 52 and told["dtypes"] == ["float32"]
    assert told["bytes_written"] == 29344
    assert set(told["files_written"]) == names(target)
    assert opt_zoo("verify", SHARDED, str(target)).exit_code == 0
    assert json.loads(opt_zoo("inspect", str(target), "--json").stdout)["fits"]


def test_the_line_after_it(opt_zoo: Runner, module: Plain, tmp_path: Path) -> None:
    target = str(tmp_path / "out")
    options = ("--to", "msgpack", "--dtype", "bfloat16")
    done = opt_zoo("convert", SHARDED, target, *options)
    expected = f"{target}: 52 tensors, 14.7 kB, bfloat16, msgpack, OPTForCausalLM\n"
    assert (done.stdout, done.stderr) == (expected, "")
    expected = expected.replace("LM\n", "LM, read back and found equal\n")
    again = (SHARDED, target, *options, "--overwrite", "--verify")
    assert opt_zoo("convert", *again).stdout == expected
    assert module(*again) == (0, expected, "")


def test_texts_travel_along(opt_zoo: Runner, model: Path, tmp_path: Path) -> None:
    done = opt_zoo("convert", str(model), str(tmp_path / "out"), "--to", "h5", "--json")
    assert {"tokenizer.json", "generation_config.json"} <= set(json.loads(done.stdout)["copied"])
    copied = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert copied == (model / "tokenizer.json").read_bytes()


def test_a_dry_run_tells_what_the_conversion_does(
    opt_zoo: Runner, module: Plain, model: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    options = ("--to", "h5", "--dtype", "float16", "--max-shard-size", "20KB", "--json")
    planned = opt_zoo("convert", str(model), str(target), *options, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert not target.exists() and not list(tmp_path.iterdir())
    plan = json.loads(planned.stdout)
    code, text, _ = module(str(model), str(target), *options, "--dry-run")
    assert (code, json.loads(text)) == (0, plan) and not list(tmp_path.iterdir())
    done = json.loads(opt_zoo("convert", str(model), str(target), *options).stdout)
    assert done == {**plan, "target": str(target), "verified": False}
    assert len([name for name in plan["files_written"] if name.endswith(".h5")]) > 1
    assert set(plan["files_written"]) == names(target)
    assert plan["bytes_written"] * 2 == plan["bytes_read"] and plan["dtypes"] == ["float16"]
    assert plan["files_open"] == 1 and plan["files_read"] == [str(model / "model.safetensors")]
    assert 0 < plan["peak_bytes"] < 100e6


def test_the_table_of_a_dry_run(opt_zoo: Runner, module: Plain, tmp_path: Path) -> None:
    given = (SHARDED, str(tmp_path / "out"), "--to", "keras", "--dry-run")
    rows = (
        r"read +29\.3 kB from 3 files \(torch\)",
        r"open at a time +3 files",
        r"peak memory +33\.6 MB beyond the interpreter",
        r"written +29\.3 kB as keras: model\.weights\.h5",
        r"files +model\.weights\.h5, config\.json",
        r"tensors +52 \(float32\)",
        r"architecture +OPTForCausalLM",
    )
    for text in (opt_zoo("convert", *given).stdout, module(*given)[1]):
        for row in rows:
            assert re.search(f"^{row}", text, re.MULTILINE), row
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_not_empty(opt_zoo: Runner, module: Plain, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    refused = opt_zoo("convert", SHARDED, str(tmp_path))
    assert isinstance(refused.exception, InputError) and names(tmp_path) == {"note.txt"}
    code, out, err = module(SHARDED, str(tmp_path))
    assert (code, out) == (2, "") and err.startswith("error: ") and "--overwrite" in err
    assert opt_zoo("convert", SHARDED, str(tmp_path), "--overwrite").exit_code == 0
    assert names(tmp_path) == {"note.txt", "config.json", "model.safetensors"}


@pytest.mark.parametrize("resume", [True, False])
def test_only_with_resume_a_failure_leaves_something(
    opt_zoo: Runner, resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("made up")

    given = (
        "convert",
        SHARDED,
        str(tmp_path / "out"),
        "--verify",
        *(["--resume"] if resume else []),
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[convert.__module__], "check_written", fail)
        assert isinstance(opt_zoo(*given).exception, CheckpointError)
    assert bool(list(tmp_path.iterdir())) == resume
    assert opt_zoo(*given).exit_code == 0 and names(tmp_path) == {"out"}


def test_another_class_of_model(opt_zoo: Runner, module: Plain, tmp_path: Path) -> None:
    untied = str(FORMATS / "safetensors_untied")
    given = (untied, str(tmp_path / "out"), "--architecture", "OPTForSequenceClassification")
    done = opt_zoo("convert", *given)
    assert done.exit_code == 0
    missing, dropped = done.stderr.splitlines()
    assert missing.startswith("warning: score.weight: not in the source, so not in the target.")
    assert dropped.startswith("warning: lm_head.weight: left out")
    code, out, err = module(*given, "--overwrite", "--json")
    assert (code, err) == (0, done.stderr)
    told = json.loads(out)
    assert (told["missing"], told["dropped"]) == (["score.weight"], ["lm_head.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["OPTForSequenceClassification"]
    unknown = opt_zoo("convert", untied, str(tmp_path / "no"), "--architecture", "GPT2")
    assert isinstance(unknown.exception, InputError) and "OPTForCausalLM" in str(unknown.exception)


def test_an_assumption_is_a_warning(opt_zoo: Runner, module: Plain, tmp_path: Path) -> None:
    source = str(with_config("bin", tmp_path / "in", architectures=["GPT2LMHead"]))
    for dry_run in (["--dry-run"], []):
        done = opt_zoo("convert", source, str(tmp_path / "out"), *dry_run)
        assert done.exit_code == 0
        assert done.stderr.startswith("warning: OPTForCausalLM assumed: ")
        assert "GPT2LMHead. --architecture names another." in done.stderr
    assert module(source, str(tmp_path / "2"))[2] == done.stderr
    named = ("--architecture", "OPTForCausalLM")
    assert opt_zoo("convert", source, str(tmp_path / "3"), *named).stderr == ""


def test_a_configuration_from_elsewhere(opt_zoo: Runner, module: Plain, tmp_path: Path) -> None:
    source = shutil.copytree(FORMATS / "h5", tmp_path / "in")
    (source / "config.json").rename(tmp_path / "config.json")
    target = str(tmp_path / "out")
    assert isinstance(opt_zoo("convert", str(source), target).exception, OPTError)
    for number, config in enumerate((tmp_path / "config.json", FORMATS / "bin", tmp_path)):
        given = (str(source), f"{target}{number}", "--config", str(config))
        assert opt_zoo("convert", *given).exit_code == 0
        assert module(*given, "--dry-run")[0] == 0


def test_a_file_as_source(opt_zoo: Runner, tmp_path: Path) -> None:
    index = FORMATS / "bin_sharded" / "pytorch_model.bin.index.json"
    assert opt_zoo("convert", str(index), str(tmp_path / "out")).exit_code == 0
    assert opt_zoo("verify", str(index), str(tmp_path / "out")).exit_code == 0


def test_unknown_values(opt_zoo: Runner, tmp_path: Path) -> None:
    for option, value in (("--to", "zip"), ("--dtype", "int3"), ("--max-shard-size", "much")):
        for dry_run in (["--dry-run"], []):
            done = opt_zoo("convert", SHARDED, str(tmp_path / "out"), option, value, *dry_run)
            assert isinstance(done.exception, OPTError), option
            assert value in str(done.exception) and not list(tmp_path.iterdir())


def test_the_plain_form_has_the_same_options() -> None:
    def spelt(options: Sequence[Sequence[str]]) -> set[str]:
        return {name for given in options for name in given if name not in ("-h", "--help")}

    command = get_command(app).commands["convert"]
    rich = [p.opts for p in command.params if p.param_type_name == "option"]
    actions = plain.parser()._actions
    assert spelt(rich) == spelt([action.option_strings for action in actions])
    arguments = [p.name for p in command.params if p.param_type_name == "argument"]
    assert arguments == [action.dest for action in actions if not action.option_strings]
    defaults = {p.name: p.default for p in command.params if p.param_type_name == "option"}
    for action in actions:
        if action.option_strings and action.dest != "help":
            name = "as_json" if action.dest == "json" else action.dest
            assert defaults[name] == action.default, name


def test_help_names_every_format(
    opt_zoo: Runner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        plain.main(["--help"])
    for text in (opt_zoo("convert", "--help").stdout, capsys.readouterr().out):
        assert all(re.search(rf"\b{name}:", text) for name in WRITABLE)


def test_progress_of_the_plain_form(
    module: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module(SHARDED, str(tmp_path / "silent"))[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    err = module(SHARDED, str(tmp_path / "out"))[2]
    assert err.startswith("\rconverting:   0% of 29.3 kB") and err.endswith(" 100% of 29.3 kB\n")


def test_as_processes(tmp_path: Path) -> None:
    for number, start in enumerate((["opt_zoo", "convert"], ["conversion"])):
        command = [sys.executable, "-m", *start, SHARDED, str(tmp_path / f"{number}")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert names(tmp_path / f"{number}") == {"config.json", "model.safetensors"}
        again = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (again.returncode, again.stdout) == (2, "")
        assert again.stderr.startswith("error: ") and "Traceback" not in again.stderr
