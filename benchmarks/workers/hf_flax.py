# SPDX-License-Identifier: Apache-2.0
"""transformers 4.57 with Flax: `python hf_flax.py CHECKPOINT [jit]`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from serving import Decoder, Tokens, serve
from transformers import FlaxOPTForCausalLM


class TransformersFlax(Decoder):
    """`generate` as it comes: the loop is a `lax.while_loop`, what surrounds it is not compiled."""

    modules = ("transformers", "jax", "flax")

    def __init__(self, checkpoint: str, mode: str = "") -> None:
        self.model = FlaxOPTForCausalLM.from_pretrained(checkpoint)
        # None cannot be: no token is the vocabulary's size.
        self.model.generation_config.eos_token_id = self.model.config.vocab_size
        self.model.generation_config.pad_token_id = 1
        self.function = (
            jax.jit(self._generate, static_argnames="new_tokens")
            if mode == "jit"
            else self._generate
        )

    def _generate(self, ids: Any, mask: Any, params: Any, new_tokens: int) -> Any:
        output = self.model.generate(
            ids, attention_mask=mask, params=params, max_new_tokens=new_tokens, do_sample=False
        )
        return output.sequences

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        ids = jnp.asarray(prompts, jnp.int32)
        out = self.function(ids, jnp.ones_like(ids), self.model.params, new_tokens=new_tokens)
        return np.asarray(out)[:, ids.shape[1] :].tolist()


if __name__ == "__main__":
    serve(TransformersFlax)
