# SPDX-License-Identifier: Apache-2.0
"""The tokenizer files that we save, read by transformers 4.37.2, 4.57.1 and 5, slow and fast, and back."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from opt_core import OPTTokenizer
from opt_core.assets import TINY_SUMS
from tests.oracle.jobs import peer_python

pytestmark = pytest.mark.oracle
GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
PEER = Path(__file__).parent / "tokenizer_peer.py"
TEXTS = json.loads((GOLDEN / "cases.json").read_text("utf-8"))["texts"]
PAIRS = [
    ("The quick", "brown fox"),
    ("a</s>", " <pad>"),
]  # an empty second text is none to fast ones
READERS = [(peer, kind) for peer in ("hf437", "hf457") for kind in ("slow", "fast")]
READERS += [("hf5", "fast")]  # there is only one kind since version 5

WINDOW_KEYS = ["input_ids", "attention_mask", "offset_mapping", "overflow_to_sample_mapping"]
LONG = "The quick brown fox doesn't jump over the lazy dog; é 😀"
WINDOW = {
    "return_overflowing_tokens": True,
    "return_offsets_mapping": True,
    "padding": "max_length",
}
WINDOWS: list[tuple[list[Any], dict[str, Any]]] = [
    ([LONG], {**WINDOW, "truncation": True, "max_length": 9, "stride": 3}),
    ([[LONG, "one", ""]], {**WINDOW, "truncation": True, "max_length": 8}),
    (["one two", LONG], {**WINDOW, "truncation": "only_second", "max_length": 16, "stride": 4}),
]


def plain() -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(GOLDEN)


def tiny_sums() -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(TINY_SUMS)


def without_bos() -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(GOLDEN, add_bos_token=False, padding_side="left")


def grown() -> OPTTokenizer:
    tokenizer = plain()
    tokenizer.add_tokens(["fox", "<new>"])
    tokenizer.add_special_tokens({"sep_token": "<sep>", "additional_special_tokens": ["<x>"]})
    return tokenizer


@pytest.mark.parametrize("make", [plain, tiny_sums, without_bos, grown])
@pytest.mark.parametrize(("peer", "kind"), READERS)
def test_transformers_reads_them_equal(peer, kind, make, tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path / "ours")
    texts = [*TEXTS, "fox <new> <sep> <x>y"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    battery = {
        "texts": texts,
        "pairs": PAIRS,
        "ids": [] if make is grown else ids,  # the fast ones put no spaces around added tokens
        "windows": WINDOWS,
        "window_keys": WINDOW_KEYS,
    }
    found = run(peer, kind, battery, tmp_path)
    expected = {
        "single": ids,
        "bare": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "pair": [tokenizer(*pair)["input_ids"] for pair in PAIRS],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "length": len(tokenizer),
        "side": tokenizer.padding_side,
        "decoded": [
            tokenizer.decode(row, True, clean_up_tokenization_spaces=False)
            for row in battery["ids"]
        ],
    }
    if kind == "fast":
        encodings = [tokenizer(*given, **options) for given, options in WINDOWS]
        windows = [{key: encoding[key] for key in WINDOW_KEYS} for encoding in encodings]
        expected["windows"] = json.loads(json.dumps(windows))
    for key, value in expected.items():
        assert found[key] == value, key

    back = OPTTokenizer.from_pretrained(tmp_path / "theirs")
    assert back.special_tokens_map == tokenizer.special_tokens_map
    assert [back(text)["input_ids"] for text in texts] == ids


def run(peer: str, kind: str, battery: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "battery.txt").write_text(json.dumps(battery), "utf-8")
    arguments = [folder / "ours", kind, folder / "battery.txt", folder / "theirs"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(peer_python(peer)), str(PEER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
