# SPDX-License-Identifier: Apache-2.0
"""Streamers: text that appears while it is generated."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, TextIO

import numpy as np

from opt_core.errors import InputError


class TextStreamer:
    """Prints the text of one sequence as soon as its words are complete.

    Args:
        tokenizer: decodes the tokens.
        skip_prompt: whether the prompt is left out.
        file: where to print; by default, the standard output.
        decoding: options of `tokenizer.decode`, such as `skip_special_tokens`.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        file: TextIO | None = None,
        **decoding: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.file = file
        self.decoding = decoding
        self.reset()

    def reset(self) -> None:
        self.tokens: list[int] = []  # since the last line break
        self.printed = 0  # characters of their text
        self.sees_prompt = True

    def put(self, value: Any) -> None:
        """Takes the prompt [1, T] or the next tokens [any].

        Raises:
            InputError: more than one row.
        """
        value = np.asarray(value)
        if (value.ndim > 1 and len(value) > 1) or (value.ndim == 1 and self.sees_prompt):
            raise InputError(
                f"A TextStreamer prints one sequence, found {len(value)}: generate them one by one."
            )
        is_prompt, self.sees_prompt = self.sees_prompt, False
        if is_prompt and self.skip_prompt:
            return
        self.tokens += value.reshape(-1).tolist()
        text = self.tokenizer.decode(self.tokens, **self.decoding)
        if text.endswith("\n"):
            self.on_text(text[self.printed :])
            self.tokens, self.printed = [], 0
            return
        # The last word may go on, and its last character may lack bytes.
        complete = text.rfind(" ") + 1
        if complete > self.printed:
            self.on_text(text[self.printed : complete])
            self.printed = complete

    def end(self) -> None:
        """Prints what is left."""
        rest = self.tokenizer.decode(self.tokens, **self.decoding)[self.printed :]
        self.reset()
        self.on_text(rest, is_last=True)

    def on_text(self, text: str, is_last: bool = False) -> None:
        """Is called with each piece of text."""
        print(text, end="\n" if is_last else "", file=self.file or sys.stdout, flush=True)


class TextIteratorStreamer(TextStreamer):
    """Hands out the text piece by piece, in another thread than the one that generates.

    Args:
        timeout: seconds to wait for a piece; `queue.Empty` is raised after them. None waits on.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decoding: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decoding)
        self.timeout = timeout
        self.pieces: SimpleQueue[str | None] = SimpleQueue()

    def on_text(self, text: str, is_last: bool = False) -> None:
        """Hands the text to whoever iterates."""
        if text:
            self.pieces.put(text)
        if is_last:
            self.pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self.pieces.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece
