# SPDX-License-Identifier: Apache-2.0
"""transformers 5 with PyTorch: `python hf_torch.py CHECKPOINT`."""

from __future__ import annotations

import torch
from serving import Decoder, Tokens, serve
from transformers import OPTForCausalLM


class TransformersTorch(Decoder):
    """`generate` as it comes: SDPA and a cache that grows."""

    modules = ("transformers", "torch")

    def __init__(self, checkpoint: str) -> None:
        self.model = OPTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 1

    @torch.no_grad()
    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False
        )
        return out[:, ids.shape[1] :].tolist()


if __name__ == "__main__":
    serve(TransformersTorch)
