# SPDX-License-Identifier: Apache-2.0
"""`opt-zoo verify`: tensors, and logits with made-up answers and with PyTorch."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from conversion import convert
from conversion.verify import Comparison, TensorComparison
from opt_core import HubError, InputError
from opt_core.checkpoints import CheckpointReader, CheckpointWriter
from opt_core.checkpoints.layouts import SAFETENSORS
from opt_zoo import render, verification
from opt_zoo.backends import Framework
from opt_zoo.demo import DEFAULT_PROMPTS
from opt_zoo.logits import Greedy, largest_difference
from opt_zoo.processes import Reply
from opt_zoo.prompts import Prompts
from opt_zoo.verification import LogitsComparison, Verification
from tests.cli.conftest import Runner

FORMATS = Path(__file__).parent.parent / "golden" / "formats" / "pre_norm"
SAFE = str(FORMATS / "safetensors")
NAME = "model.decoder.layers.1.fc1.weight"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A copy of a golden checkpoint with one value changed by 0.5."""
    with CheckpointReader.open(SAFE) as reader:
        arrays = {name: tensor.read() for name, tensor in reader.items()}
        infos = [tensor.info for tensor in reader.values()]
    arrays[NAME][3, 2] += 0.5
    (tmp_path / "other").mkdir()
    shutil.copy(FORMATS / "safetensors" / "config.json", tmp_path / "other")
    with CheckpointWriter(tmp_path / "other", infos, SAFETENSORS) as writer:
        for name, array in arrays.items():
            writer.write(name, [array])
    return tmp_path / "other"


def test_equal_whatever_the_format(opt_zoo: Runner) -> None:
    for name in ("bin_legacy", "h5_sharded", "msgpack", "tf_safetensors", "flax_safetensors"):
        done = opt_zoo("verify", SAFE, str(FORMATS / name))
        assert done.exit_code == 0, done.output
        assert (done.stdout, done.stderr) == ("52 of 52 tensors are bit-equal.\n", "")
    told = json.loads(opt_zoo("verify", SAFE, str(FORMATS / "h5"), "--json").stdout)
    assert told == {
        "first": SAFE,
        "second": str(FORMATS / "h5"),
        "passed": True,
        "equal": True,
        "tensors": 52,
        "different": [],
        "only_first": [],
        "only_second": [],
        "prompts": [],
        "logits": [],
    }


def test_another_value(opt_zoo: Runner, other: Path) -> None:
    done = opt_zoo("verify", SAFE, str(other))
    assert done.exit_code == 1 and done.stderr == "The checkpoints differ.\n"
    assert NAME in done.stdout and "5.0e-01" in done.stdout
    assert "51 of 52 tensors are bit-equal." in done.stdout
    again = opt_zoo("verify", SAFE, str(other), "--json")
    assert again.exit_code == 1
    told = json.loads(again.stdout)
    assert not told["passed"] and not told["equal"] and told["tensors"] == 52
    (tensor,) = told["different"]
    assert (
        tensor["name"] == NAME and tensor["shapes"] == [[24, 16], [24, 16]] and not tensor["equal"]
    )
    assert tensor["dtypes"] == ["float32", "float32"]
    assert tensor["difference"] == pytest.approx(0.5)
    assert tensor["relative"] == pytest.approx(0.5 / tensor["largest"])


def test_another_dtype_the_worst_rows_first(opt_zoo: Runner, tmp_path: Path) -> None:
    convert(SAFE, tmp_path / "out", dtype="bfloat16")
    done = opt_zoo("verify", SAFE, str(tmp_path / "out"))
    assert done.exit_code == 1
    assert done.stdout.count("float32 / bfloat16") == 20
    assert "... and 32 more" in done.stdout and "0 of 52" in done.stdout
    told = json.loads(opt_zoo("verify", SAFE, str(tmp_path / "out"), "--json").stdout)
    relative = [tensor["relative"] for tensor in told["different"]]
    assert len(relative) == 52 and relative == sorted(relative, reverse=True)
    assert relative[0] < 2**-7


def test_a_tensor_that_only_one_holds(opt_zoo: Runner) -> None:
    untied = str(FORMATS / "safetensors_untied")
    for pair, key in (((SAFE, untied), "only_second"), ((untied, SAFE), "only_first")):
        done = opt_zoo("verify", *pair, "--json")
        told = json.loads(done.stdout)
        assert done.exit_code == 1 and told[key] == ["lm_head.weight"]
        assert f"only in {untied}: lm_head.weight" in opt_zoo("verify", *pair).stdout.replace(
            "\n", ""
        )


def test_errors(opt_zoo: Runner, model: Path, tmp_path: Path) -> None:
    assert isinstance(opt_zoo("verify", SAFE, "/no/such/model").exception, HubError)
    for option in (("--framework", "torch"), ("--prompt", "one")):
        refused = opt_zoo("verify", SAFE, SAFE, *option).exception
        assert isinstance(refused, InputError) and "expected --logits with them" in str(refused)
    file = str(model / "model.safetensors")
    refused = opt_zoo("verify", str(model), file, "--logits", "--framework", "torch").exception
    assert isinstance(refused, InputError) and "found a file" in str(refused)
    refused = opt_zoo("verify", SAFE, SAFE, "--logits", "--framework", "torch").exception
    assert isinstance(refused, InputError) and "expected a tokenizer in one" in str(refused)
    command = [sys.executable, "-m", "opt_zoo", "verify", SAFE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: ")


# ---- what passes ----------------------------------------------------------------------------------


def compared(*dtypes: str, difference: float = 0.1, only_first: tuple[str, ...] = ()) -> Comparison:
    tensor = TensorComparison("x", (1,), dtypes, difference == 0, difference, 1.0)
    return Comparison(Path("a"), Path("b"), (tensor,), only_first, ())


def said(same_tokens: bool) -> LogitsComparison:
    return LogitsComparison(Framework.TORCH, 0.1, 0.01, same_tokens, (((5,),), ((5,),)))


def test_tensors_decide_unless_the_dtypes_differ_on_purpose() -> None:
    same = compared("float32", "float32", difference=0)
    value = compared("float32", "float32")
    dtype = compared("float32", "bfloat16")
    more = compared("float32", "float32", difference=0, only_first=("y",))
    assert [Verification(c).passed for c in (same, value, dtype, more)] == [True] + [False] * 3
    for tokens, passed in ((True, [True, False, True, False]), (False, [False] * 4)):
        found = [
            Verification(c, ("p",), (said(tokens),)).passed for c in (same, value, dtype, more)
        ]
        assert found == passed
    both = (said(True), said(False))
    assert not Verification(dtype, ("p",), both).passed


def test_what_is_no_number_comes_first_and_is_null_in_json() -> None:
    worst = TensorComparison("n", (1,), ("float32", "float32"), False, math.nan, 1.0)
    zeros = TensorComparison("z", (1,), ("float32", "float32"), False, 0.5, 0.0)
    comparison = compared("float32", "float32")
    tensors = (*comparison.tensors, zeros, worst)
    found = Verification(dataclasses.replace(comparison, tensors=tensors))
    assert [t.name for t in found.different] == ["n", "z", "x"]
    told = json.loads(json.dumps(verification.to_dict(found), allow_nan=False))
    assert [(t["difference"], t["relative"]) for t in told["different"]] == [
        (None, None),
        (0.5, 0.5),
        (0.1, 0.1),
    ]


def test_the_last_line_says_why_it_passes() -> None:
    comparison = compared("float32", "bfloat16")
    for logits, expected in (
        ((), "0 of 1 tensors are bit-equal.\n"),
        ((said(True),), "in another dtype, and the tokens are the same.\n"),
        ((said(False),), "0 of 1 tensors are bit-equal.\n"),
    ):
        console = Console(width=100)
        with console.capture() as capture:
            console.print(render.verification(Verification(comparison, ("p",), logits)))
        assert capture.get().endswith(expected)


def test_logits_of_another_vocabulary_cannot_be_compared() -> None:
    absolute, relative = largest_difference(np.zeros((2, 3)), np.zeros((2, 4)))
    assert math.isnan(absolute) and math.isnan(relative)


# ---- logits ---------------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Framework, Path]]:
    """Frameworks that answer at once: the second checkpoint's logits are a little off."""
    asked: list[tuple[Framework, Path]] = []

    def run(framework: Framework, prompts: Prompts, **_: object) -> Greedy:
        asked.append((framework, prompts.directory))
        last = 7 if framework == Framework.FLAX and len(asked) % 2 == 0 else 6
        logits = np.full((4, 3), 2.0 + len(asked) % 2, np.float32)
        return Greedy(((5, last),), logits, Reply([], {}, 0))

    monkeypatch.setattr(verification, "run_greedily", run)
    return asked


def test_logits_in_each_framework_asked_for(
    opt_zoo: Runner, model: Path, tmp_path: Path, answers: list[tuple[Framework, Path]]
) -> None:
    second = shutil.copytree(model, tmp_path / "second")
    for text in second.glob("*tok*"):
        text.unlink()
    (second / "vocab.json").unlink()
    given = ("verify", str(model), str(second), "--logits", "--framework", "torch")
    done = opt_zoo(*given, "--framework", "tf")
    assert done.exit_code == 0, done.output
    assert [(str(f), d) for f, d in answers] == [
        (name, directory) for name in ("torch", "tf") for directory in (model, second)
    ]
    assert "PyTorch" in done.stdout and "1.0e+00" in done.stdout and "3.3e-01" in done.stdout
    told = json.loads(opt_zoo(*given, "--prompt", "one", "--prompt", "two", "--json").stdout)
    assert told["prompts"] == ["one", "two"] and told["passed"]
    assert told["logits"] == [
        {
            "framework": "torch",
            "absolute": 1.0,
            "relative": pytest.approx(1 / 3),
            "same_tokens": True,
            "tokens": [[[5, 6]], [[5, 6]]],
        }
    ]
    swapped = opt_zoo("verify", str(second), str(model), "--logits", "--framework", "flax")
    assert swapped.exit_code == 1 and "DIFFERENT" in swapped.stdout
    assert "36 of 36 tensors are bit-equal" in swapped.stdout


def test_logits_with_pytorch(opt_zoo: Runner, model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", to="h5", dtype="float16")
    given = ("verify", str(model), str(tmp_path / "out"), "--logits", "--framework", "torch")
    done = opt_zoo(*given, "--json")
    told = json.loads(done.stdout)
    assert told["prompts"] == list(DEFAULT_PROMPTS) and not told["equal"]
    (found,) = told["logits"]
    assert 0 < found["relative"] < 0.01
    first, second = found["tokens"]
    assert len(first) == len(DEFAULT_PROMPTS) and (first == second) == found["same_tokens"]
    assert done.exit_code == (0 if found["same_tokens"] else 1)
