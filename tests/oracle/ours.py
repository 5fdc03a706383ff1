# SPDX-License-Identifier: Apache-2.0
"""Runs jobs with one of our backends: `python -m tests.oracle.ours torch|tf|flax FOLDER`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np


def main(framework: str, folder: Path) -> None:
    backend = importlib.import_module(f"tests.backends.{framework}").BACKEND
    for index, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        inputs = dict(np.load(job["inputs"]))
        model = backend.load(job["checkpoint"], dtype=job["dtype"])
        if job["options"] is not None:
            found = backend.generate(model, **inputs, **job["options"])
            np.savez(folder / f"{index}.npz", new=found[:, inputs["input_ids"].shape[1] :])
            continue
        result = {"logits": backend.forward(model, **inputs)["logits"]}
        if job["new_tokens"]:
            options = {"max_new_tokens": job["new_tokens"], "eos_token_id": None}
            result["sequences"] = backend.generate(model, **inputs, **options)
        np.savez(folder / f"{index}.npz", **result)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
