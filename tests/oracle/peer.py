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


def run_pt(job: dict[str, Any], ids: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    import torch
    from transformers import OPTForCausalLM

    dtype = getattr(torch, job["dtype"])
    model = OPTForCausalLM.from_pretrained(job["checkpoint"], torch_dtype=dtype).eval()
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
