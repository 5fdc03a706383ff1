# SPDX-License-Identifier: Apache-2.0
"""Streamers print what the whole text would be, and never half a word or half a character."""

from __future__ import annotations

import io
import queue
import threading

import numpy as np
import pytest

from opt_core import InputError, OPTTokenizer, TextIteratorStreamer, TextStreamer
from tests.cases import GOLDEN

TEXTS = (
    "Hello world, this is it.",
    "two\nlines and\n\nmore",
    "emoji 🙂 and 日本語 inside",
    " leading",
    "trailing ",
    "",
)


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(GOLDEN / "tokenizer")


def stream(streamer: TextStreamer, prompt: list[int], tokens: list[int]) -> None:
    streamer.put(np.array([prompt]))
    for token in tokens:
        streamer.put(np.array([token]))
    streamer.end()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", [1, 3])
def test_the_pieces_are_the_text(tokenizer: OPTTokenizer, text: str, cut: int) -> None:
    ids = tokenizer(text)["input_ids"]
    pieces: list[str] = []

    class Keeps(TextStreamer):
        def on_text(self, text: str, is_last: bool = False) -> None:
            pieces.append(text)

    stream(Keeps(tokenizer, skip_special_tokens=True), ids[:cut], ids[cut:])
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_words_appear_when_they_are_complete(tokenizer: OPTTokenizer) -> None:
    ids = tokenizer("some words here", add_special_tokens=False)["input_ids"]
    file = io.StringIO()
    streamer = TextStreamer(tokenizer, file=file)
    seen = []
    for index, token in enumerate(ids):
        streamer.put(np.array([[token]] if index == 0 else [token]))
        seen.append(file.getvalue())
    assert all(text == "" or text.endswith(" ") for text in seen)
    streamer.end()
    assert file.getvalue() == "some words here\n"


def test_the_prompt_can_be_left_out(tokenizer: OPTTokenizer) -> None:
    prompt, rest = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("some", " words")
    )
    file = io.StringIO()
    stream(TextStreamer(tokenizer, skip_prompt=True, file=file), prompt, rest)
    assert file.getvalue() == " words\n"


def test_a_streamer_serves_again(tokenizer: OPTTokenizer) -> None:
    ids = tokenizer("a b c", add_special_tokens=False)["input_ids"]
    file = io.StringIO()
    streamer = TextStreamer(tokenizer, skip_prompt=True, file=file)
    for _ in range(2):
        stream(streamer, ids[:1], ids[1:])
    assert file.getvalue() == " b c\n" * 2


def test_several_rows_are_refused(tokenizer: OPTTokenizer) -> None:
    with pytest.raises(InputError, match="prints one sequence, found 2"):
        TextStreamer(tokenizer).put(np.array([[5, 6], [7, 8]]))


def test_iterating_in_another_thread(tokenizer: OPTTokenizer) -> None:
    ids = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    streamer = TextIteratorStreamer(tokenizer, timeout=10)
    thread = threading.Thread(target=stream, args=(streamer, ids[:2], ids[2:]))
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == TEXTS[0] and len(pieces) > 2
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(tokenizer, timeout=0.01))
