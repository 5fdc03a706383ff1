# SPDX-License-Identifier: Apache-2.0
"""CTranslate2: `python ct2.py CHECKPOINT float32|int8`; converts where that has not been done."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from ctranslate2 import Generator
from ctranslate2.converters import TransformersConverter
from serving import Decoder, Tokens, serve


class CTranslate2(Decoder):
    """One generator on all cores; its vocabulary turns ids into the words that it takes."""

    modules = ("ctranslate2",)

    def __init__(self, checkpoint: str, dtype: str) -> None:
        folder = Path(f"{checkpoint}-ctranslate2-{dtype}")
        if not folder.exists():
            quantization = None if dtype == "float32" else dtype
            TransformersConverter(checkpoint).convert(str(folder), quantization=quantization)
        self.words = json.loads((folder / "vocabulary.json").read_text("utf-8"))
        self.model = Generator(str(folder), compute_type=dtype, intra_threads=os.cpu_count() or 1)

    def _run(self, prompts: Tokens, new_tokens: int, logits: bool = False) -> list:
        return self.model.generate_batch(
            [[self.words[token] for token in prompt] for prompt in prompts],
            max_length=new_tokens,
            end_token=[],
            include_prompt_in_result=False,
            return_logits_vocab=logits,
        )

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        return [result.sequences_ids[0] for result in self._run(prompts, new_tokens)]

    def logits(self, prompts: Tokens, new_tokens: int) -> np.ndarray:
        results = self._run(prompts, new_tokens, logits=True)
        return np.stack([np.stack([np.array(step) for step in r.logits[0]]) for r in results], 1)


if __name__ == "__main__":
    serve(CTranslate2)
