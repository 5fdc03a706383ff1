# SPDX-License-Identifier: Apache-2.0
"""`opt-zoo generate` with strategies, streaming and figures, with PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opt_core import GenerationConfig, InputError
from opt_core.generation.strategies import GenerationMode, choose_mode
from opt_zoo.strategies import OPTIONS, parse_options
from tests.cli.conftest import Runner

SUM = ("generate", "--framework", "torch", "--prompt", "forty-two plus seventeen is")


def test_each_strategy_has_options_that_ask_for_it() -> None:
    needs = {GenerationMode.CONSTRAINED_BEAM: {"force_words_ids": [[5]]}}
    assert set(OPTIONS) == set(GenerationMode)
    for mode, options in OPTIONS.items():
        given = GenerationConfig().replace(**options, **needs.get(mode, {}))
        assisted = mode is GenerationMode.ASSISTED
        assert choose_mode(given, constrained=False, assisted=assisted) is mode


def test_options_are_json_or_words() -> None:
    texts = ["num_beams=3", "bad_words_ids=[[5, 6]]", "early_stopping=never", "top_p=0.5"]
    assert parse_options(texts) == {
        "num_beams": 3,
        "bad_words_ids": [[5, 6]],
        "early_stopping": "never",
        "top_p": 0.5,
    }
    for wrong in ("num_beams", "=3"):
        with pytest.raises(InputError, match="expected NAME=VALUE"):
            parse_options([wrong])


def test_beams_and_figures(opt_zoo: Runner) -> None:
    done = opt_zoo(*SUM, "--strategy", "beam", "--num-return-sequences", "2", "--json", "--stats")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert rows[0]["text"] == " fifty-nine" and len(rows) == 2
    assert "tokens/s" in done.stderr


def test_streaming_prints_what_is_printed_without(opt_zoo: Runner) -> None:
    streamed, plain = (opt_zoo(*SUM, *more) for more in (("--stream",), ()))
    assert streamed.exit_code == 0, streamed.output
    assert streamed.stdout == plain.stdout == "forty-two plus seventeen is fifty-nine\n"


def test_stopping_at_a_text(opt_zoo: Runner) -> None:
    done = opt_zoo(*SUM, "--stop", "fifty")
    assert done.stdout == "forty-two plus seventeen is fifty\n"


def test_an_assistant_changes_no_token(opt_zoo: Runner, model: Path) -> None:
    done = opt_zoo(*SUM, "--strategy", "assisted", "--assistant", str(model))
    assert done.stdout == "forty-two plus seventeen is fifty-nine\n", done.output


def test_a_word_that_must_appear(opt_zoo: Runner) -> None:
    options = ("--strategy", "constrained-beam", "--force-word", "ninety")
    assert "ninety" in opt_zoo(*SUM, *options).stdout.removeprefix(SUM[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strategy", "assisted"), "ask for greedy decoding. It needs --assistant"),
        (("--strategy", "greedy", "--do-sample"), "ask for sample decoding"),
        (("--strategy", "constrained-beam"), "ask for beam decoding. It needs --force-word"),
        (("--option", "num_beam=3"), "no option 'num_beam'. Did you mean 'num_beams'"),
        (("--stream", "--prompt", "one"), "--stream prints one prompt, found 2"),
    ],
)
def test_errors(opt_zoo: Runner, options: tuple[str, ...], message: str) -> None:
    done = opt_zoo(*SUM, *options)
    assert isinstance(done.exception, InputError) and message in str(done.exception)
