# SPDX-License-Identifier: Apache-2.0
"""Runs jobs with transformers, whatever version; imports nothing of this project.

python peer.py pt|tf|flax FOLDER      # FOLDER/jobs.json in, FOLDER/0.npz ... out
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def greedy(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Options for greedy decoding to the full length; an eos of None would mean the model's own."""
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return {"max_new_tokens": job["new_tokens"], "do_sample": False}


SHIFT, SHIFTED_MODELS = 1e-4, 2


def generate_pt(
    model: Any, job: dict[str, Any], ids: np.ndarray, mask: np.ndarray
) -> dict[str, Any]:
    """The new tokens of each row by itself, `row/0` [R, any] ..., and whether they are well determined.

    `stable` says whether models whose weights differ a little give the same.
    """
    import torch
    from transformers import GenerationConfig, OPTForCausalLM

    options = {key: value for key, value in job["options"].items() if value is not None}
    if "sequence_bias" in options:
        options["sequence_bias"] = {tuple(ids): bias for ids, bias in options["sequence_bias"]}
    config = GenerationConfig(bos_token_id=2, **options)

    def rows(model: Any) -> list[np.ndarray]:
        found = []
        for row, real in zip(ids, mask, strict=True):
            prompt = torch.from_numpy(row[None, real == 1])
            sequences = model.generate(prompt, generation_config=config)
            found.append(sequences[:, prompt.shape[1] :].numpy())
        return found

    result, stable = rows(model), True
    for seed in range(SHIFTED_MODELS):
        generator = torch.Generator().manual_seed(seed)
        other = OPTForCausalLM(model.config).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            for weight in other.parameters():
                weight.mul_(1 + SHIFT * torch.randn(weight.shape, generator=generator))
        stable &= all(map(np.array_equal, result, rows(other)))
    return {"stable": stable, **{f"row/{index}": new for index, new in enumerate(result)}}


def run_pt(job: dict[str, Any], ids: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    import torch
    from transformers import OPTForCausalLM

    dtype = getattr(torch, job["dtype"])
    model = OPTForCausalLM.from_pretrained(job["checkpoint"], torch_dtype=dtype).eval()
    if job["options"] is not None:
        return generate_pt(model, job, ids, mask)
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    with torch.no_grad():
        result = {"logits": model(**inputs).logits.float().numpy()}
        if job["new_tokens"]:
            result["sequences"] = model.generate(**inputs, **greedy(model, job)).numpy()
    return result


def run_tf(job: dict[str, Any], ids: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    import tensorflow as tf
    from transformers import TFOPTForCausalLM

    model = TFOPTForCausalLM.from_pretrained(job["checkpoint"])
    inputs = {"input_ids": tf.constant(ids), "attention_mask": tf.constant(mask)}
    result = {"logits": model(inputs, training=False).logits.numpy()}
    if job["new_tokens"]:
        result["sequences"] = model.generate(**inputs, **greedy(model, job)).numpy()
    return result


def run_flax(job: dict[str, Any], ids: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    from transformers import FlaxOPTForCausalLM

    model = FlaxOPTForCausalLM.from_pretrained(job["checkpoint"])
    result = {"logits": np.asarray(model(ids, attention_mask=mask).logits)}
    if job["new_tokens"]:
        options = greedy(model, job)
        result["sequences"] = np.asarray(
            model.generate(ids, attention_mask=mask, **options).sequences
        )
    return result


RUN = {"pt": run_pt, "tf": run_tf, "flax": run_flax}


def main(framework: str, folder: Path) -> None:
    for index, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        inputs = np.load(job["inputs"])
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        result = RUN[framework](job, ids, mask)
        np.savez(folder / f"{index}.npz", **result)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
