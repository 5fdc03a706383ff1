# SPDX-License-Identifier: Apache-2.0
"""Write what transformers 4.37.2 computes with the heads for classification and for questions.

Run it in an environment with transformers==4.37.2; it imports nothing of this project. The base
models are those of make_golden.py; `weights/...` are the heads', drawn by numpy from fixed seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from golden_generation import BATCH, LENGTH, PAD
from make_golden import MASKS, build
from transformers import OPTForQuestionAnswering, OPTForSequenceClassification

MODELS = ("pre_norm", "post_norm", "untied_gelu")
NUM_LABELS = 3
#: Problem -> number of labels and the labels of three rows; the first is -100 in one of the cases.
PROBLEMS: dict[str, tuple[int, list[Any]]] = {
    "single_label_classification": (NUM_LABELS, [2, 0, 1]),
    "single_label_classification, ignored": (NUM_LABELS, [2, -100, 1]),
    "multi_label_classification": (NUM_LABELS, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.5, 1.0, 0.0]]),
    "regression": (1, [0.5, -2.0, 1.25]),
    "regression, several": (NUM_LABELS, [[0.5, -2.0, 1.25], [3.0, 0.0, 1.0], [-1.0, 0.25, 0.75]]),
}
#: Name -> start and end positions; below 0 they count as 0, from the text's length on not at all.
SPANS: dict[str, tuple[list[int], list[int]]] = {
    "inside": ([0, 2, 4], [1, 2, 6]),
    "negative": ([-1, 2, -7], [1, -1, 6]),
    "beyond": ([0, LENGTH, 4], [LENGTH + 5, 99, 6]),
}
Arrays = dict[str, np.ndarray]


def inputs(rng: np.random.Generator, vocab_size: int) -> dict[str, dict[str, torch.Tensor]]:
    """One batch for each padding, with the pad token at pads."""
    found = {}
    for situation, rows in {"unpadded": None, **MASKS}.items():
        mask = np.ones((BATCH, LENGTH), np.int64) if rows is None else np.array(rows)
        ids = np.where(mask == 1, rng.integers(3, vocab_size, mask.shape), PAD)
        found[situation] = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
        }
    return found


def head(model: Any, base: Any, weights: dict[str, np.ndarray]) -> Any:
    """The model with the base's parameters and these of its head."""
    state = {k: v for k, v in base.state_dict().items() if k.startswith("model.")}
    state |= {name: torch.from_numpy(array) for name, array in weights.items()}
    model.load_state_dict(state)
    return model.eval()


def gradients(model: Any, loss: torch.Tensor) -> Arrays:
    """Those of the head, and one from the depth of the model."""
    model.zero_grad()
    loss.backward()
    names = (
        "score.weight",
        "qa_outputs.weight",
        "qa_outputs.bias",
        "model.decoder.layers.0.fc1.weight",
    )
    return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if n in names}


def record_classification(name: str, rng: np.random.Generator) -> Arrays:
    """Logits of all tokens and the pooled ones; losses and gradients of each problem."""
    base, arrays = build(name), {}
    for problem, (num_labels, labels) in PROBLEMS.items():
        key = f"weights/{num_labels}/score.weight"
        shape = (num_labels, base.config.word_embed_proj_dim)
        if key not in arrays:
            arrays[key] = (0.4 * rng.standard_normal(shape)).astype(np.float32)
        base.config.num_labels = num_labels
        base.config.problem_type = problem.split(",")[0]
        model = OPTForSequenceClassification(base.config)
        head(model, base, {"score.weight": arrays[key]})
        arrays[f"classification/{problem}/labels"] = np.array(labels)
        for situation, batch in inputs(np.random.default_rng(7), base.config.vocab_size).items():
            start = f"classification/{problem}/{situation}"
            output = model(**batch, labels=torch.tensor(labels))
            arrays |= {f"{start}/{k}": v.numpy() for k, v in batch.items()}
            arrays[f"{start}/pooled"] = output.logits.detach().numpy()
            arrays[f"{start}/loss"] = output.loss.detach().numpy()
            hidden_states = model.model(**batch).last_hidden_state
            arrays[f"{start}/tokens"] = model.score(hidden_states).detach().numpy()
            if situation == "unpadded":
                found = gradients(model, output.loss)
                arrays |= {f"{start}/gradient/{k}": v for k, v in found.items()}
    return arrays


def record_questions(name: str, rng: np.random.Generator) -> Arrays:
    """Logits, and losses and gradients of each span."""
    base, arrays = build(name), {}
    size = base.config.word_embed_proj_dim
    weights = {
        "qa_outputs.weight": (0.4 * rng.standard_normal((2, size))).astype(np.float32),
        "qa_outputs.bias": rng.standard_normal(2).astype(np.float32),
    }
    arrays |= {f"weights/span/{key}": value for key, value in weights.items()}
    model = head(OPTForQuestionAnswering(base.config), base, weights)
    for situation, batch in inputs(np.random.default_rng(8), base.config.vocab_size).items():
        start = f"questions/{situation}"
        arrays |= {f"{start}/{k}": v.numpy() for k, v in batch.items()}
        for span, ends in SPANS.items():
            positions = [torch.tensor(end) for end in ends]
            output = model(**batch, start_positions=positions[0], end_positions=positions[1])
            arrays[f"{start}/loss/{span}"] = output.loss.detach().numpy()
            if (
                situation == "right"
            ):  # at pads on the left, its gradients are those of a rounding error
                found = gradients(model, output.loss)
                arrays |= {f"{start}/gradient/{span}/{k}": v for k, v in found.items()}
        arrays[f"{start}/start_logits"] = output.start_logits.detach().numpy()
        arrays[f"{start}/end_logits"] = output.end_logits.detach().numpy()
    for span, ends in SPANS.items():
        arrays[f"spans/{span}"] = np.array(ends)
    return arrays


def main() -> None:
    """Write everything below --out (default: this folder)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out / "heads"
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    for number, name in enumerate(MODELS):
        arrays = record_classification(name, np.random.default_rng([number, 0]))
        arrays |= record_questions(name, np.random.default_rng([number, 1]))
        arrays["versions"] = np.array(
            f"transformers {transformers.__version__}, {torch.__version__}"
        )
        np.savez_compressed(out / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main()
