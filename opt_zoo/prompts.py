# SPDX-License-Identifier: Apache-2.0
"""Between texts and the tokens that workers take and give."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from opt_core.config import CONFIG_NAME, OPTConfig
from opt_core.errors import InputError
from opt_core.generation.config import GENERATION_CONFIG_NAME, GenerationConfig
from opt_core.hub import resolve
from opt_core.tokenizer import OPTTokenizer


@dataclass(frozen=True)
class Prompts:
    """Texts as a left-padded batch, and the way back from sequences to texts."""

    texts: tuple[str, ...]
    directory: Path  # of the model
    tokenizer: OPTTokenizer
    inputs: dict[str, list[list[int]]]  # input_ids and attention_mask, [B, T]
    eos_token_ids: tuple[int, ...]

    @classmethod
    def encode(cls, model: str | os.PathLike[str], texts: Sequence[str]) -> Self:
        """Encodes texts with a model's tokenizer, fetching the model if need be; raises OPTError."""
        _check(texts)
        directory = resolve(model)
        tokenizer = OPTTokenizer.from_pretrained(directory, padding_side="left")
        batch: dict[str, Any] = tokenizer(list(texts), padding=True)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return cls(tuple(texts), directory, tokenizer, inputs, _eos_token_ids(directory))

    def for_model(self, model: str | os.PathLike[str]) -> Self:
        """The same tokens for another model, whose own tokenizer is not asked; raises OPTError."""
        directory = resolve(model)
        return replace(self, directory=directory, eos_token_ids=_eos_token_ids(directory))

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[B, T], true at real tokens."""
        return np.asarray(self.inputs["attention_mask"], bool)

    def new_tokens(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """What was generated, row by row, up to the first end of sequence, which counts."""
        width = len(self.inputs["input_ids"][0])
        rows = [list(sequence[width:]) for sequence in sequences]
        for row in rows:
            ends = [index for index, token in enumerate(row) if token in self.eos_token_ids]
            del row[ends[0] + 1 if ends else len(row) :]
        return rows

    def words(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of words in the middle of a text."""
        ids: Any = self.tokenizer([f" {text}" for text in texts], add_special_tokens=False)
        return list(ids["input_ids"]) if texts else []

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of tokens, special ones left out."""
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def _check(texts: Sequence[str]) -> None:
    if not texts or not all(texts):
        raise InputError("Expected at least one prompt, none of them empty.")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"Prompt {text!r}: expected text, found {text[error.start]!r} at character "
                f"{error.start}, half a surrogate pair or a byte that is not UTF-8. Give it in UTF-8."
            ) from error


def _eos_token_ids(directory: Path) -> tuple[int, ...]:
    """As `generate` will see them: the generation config's, else the model's."""
    path = directory / GENERATION_CONFIG_NAME
    if path.is_file():
        return GenerationConfig.from_json_file(path).eos_token_ids
    return OPTConfig.from_json_file(directory / CONFIG_NAME).eos_token_ids
