# SPDX-License-Identifier: Apache-2.0
"""Ours: `python ours.py CHECKPOINT torch|tf|flax loaded|prepared|int8`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from serving import Decoder, Tokens, serve

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs in a source tree, installed or not

from opt_core.encodings import to_tensors
from opt_zoo.backends import BACKENDS, CausalLM, Framework

MODULES = {
    Framework.TORCH: ("torch",),
    Framework.TF: ("tensorflow", "keras"),
    Framework.FLAX: ("jax", "flax"),
}


class Ours(Decoder):
    """One of the three backends, with its weights as loaded, prepared or rounded to eight bits."""

    def __init__(self, checkpoint: str, framework: str, weights: str) -> None:
        self.framework = Framework(framework)
        self.modules = MODULES[self.framework]
        self.model = CausalLM.load(self.framework, checkpoint, None).model
        self.weights = weights
        if weights == "int8":
            self.model.prepare_for_decoding(weights="int8")

    def prepare(self, batch: int) -> None:
        if self.weights == "prepared":
            self.model.prepare_for_decoding(batch_size=batch)

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        found = self._run(prompts, new_tokens)
        sequences = found.sequences if self.framework is Framework.FLAX else found
        return np.asarray(sequences)[:, len(prompts[0]) :].tolist()

    def logits(self, prompts: Tokens, new_tokens: int) -> np.ndarray:
        output = self._run(prompts, new_tokens, return_dict_in_generate=True, output_logits=True)
        return np.stack([np.asarray(step) for step in output.logits])

    def _run(self, prompts: Tokens, new_tokens: int, **options: Any) -> Any:
        inputs = {"input_ids": prompts, "attention_mask": np.ones_like(prompts).tolist()}
        tensors = to_tensors(inputs, BACKENDS[self.framework].return_tensors)
        options |= {"max_new_tokens": new_tokens, "eos_token_id": None, "do_sample": False}
        return self.model.generate(**tensors, **options)


if __name__ == "__main__":
    serve(Ours)
