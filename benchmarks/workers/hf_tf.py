# SPDX-License-Identifier: Apache-2.0
"""transformers 4.57 with TensorFlow: `python hf_tf.py CHECKPOINT xla|graph`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from serving import Decoder, Tokens, serve
from transformers import TFOPTForCausalLM


class TransformersTF(Decoder):
    """`generate` inside a `tf.function`, compiled by XLA or not; traced once for each shape."""

    modules = ("transformers", "tensorflow")

    def __init__(self, checkpoint: str, mode: str) -> None:
        self.model = TFOPTForCausalLM.from_pretrained(checkpoint, from_pt=True)
        self.model.config.eos_token_id = None
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 1
        self.function = tf.function(
            self._generate, jit_compile=mode == "xla", reduce_retracing=False
        )

    def _generate(self, ids: Any, mask: Any, new_tokens: int) -> Any:
        if new_tokens == 1:  # for which `generate` fails in a graph: what it would run
            logits = self.model(ids, attention_mask=mask, use_cache=True).logits
            return tf.concat([ids, tf.argmax(logits[:, -1:], -1, tf.int32)], axis=1)
        return self.model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False
        )

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        ids = tf.constant(prompts, tf.int32)
        out = self.function(ids, tf.ones_like(ids), new_tokens)
        return out.numpy()[:, ids.shape[1] :].tolist()


if __name__ == "__main__":
    serve(TransformersTF)
