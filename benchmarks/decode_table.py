# SPDX-License-Identifier: Apache-2.0
"""Who takes part in `benchmarks/decode.py`, in which jobs, and which ratios are aimed at: data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.contest import Program

#: size -> the scale of its random weights, with which greedy tokens vary.
SCALES = {"opt-125m": 3.0, "opt-350m": 0.3}
SIZES = tuple(SCALES)


@dataclass(frozen=True)
class Job:
    """Greedy decoding of `new` tokens after prompts of `prompt`, and who runs side by side."""

    title: str
    batch: int
    prompt: int
    new: int
    names: tuple[str, ...]
    weighs_logits: bool = False  # the logits' error of ours and of rounded weights is stated


EXACT = ("ours", "ours prepared", "transformers", "keras-hub", "CTranslate2")
JOBS = {
    "decode-1": Job("decode, batch 1", 1, 32, 64, EXACT, weighs_logits=True),
    "decode-8": Job("decode, batch 8", 8, 32, 64, EXACT),
    "prefill": Job(
        "prefill 512 (time to first token)",
        1,
        512,
        1,
        (
            "ours",
            "ours prepared",
            "transformers",
            "transformers graph",
            "transformers jit",
            "CTranslate2",
        ),
    ),
    "int8": Job(
        "decode, batch 1, int8 weights",
        1,
        32,
        64,
        ("ours", "ours int8", "transformers", "CTranslate2 int8"),
        weighs_logits=True,
    ),
}


#: Bytes to sum up, more than caches hold.
ARRAY = 2**30
BANDWIDTH = Program("bandwidth", (str(ARRAY),))
CTRANSLATE2 = {
    "CTranslate2": Program("ct2", ("float32",), "ct2"),
    "CTranslate2 int8": Program("ct2", ("int8",), "ct2", exact=False),
}


def _column(framework: str, keras_backend: str, peers: Mapping[str, Program]) -> dict[str, Program]:
    variables = {"KERAS_BACKEND": keras_backend}
    return {
        "ours": Program("ours", (framework, "loaded")),
        "ours prepared": Program("ours", (framework, "prepared")),
        "ours int8": Program("ours", (framework, "int8"), exact=False),
        **peers,
        # keras-hub has no opt-350m: its layers cannot stand before their norms.
        "keras-hub": Program("kh", (), "kh", variables, sizes=("opt-125m",)),
        **CTRANSLATE2,
    }


#: What TF in transformers 4.57 needs: Keras 2.
_LEGACY = {"TF_USE_LEGACY_KERAS": "1"}
#: framework -> the contestants beside each other, by name; the first word is the contestant's group.
COLUMNS: Mapping[str, Mapping[str, Program]] = {
    "torch": _column("torch", "torch", {"transformers": Program("hf_torch", (), "hf5")}),
    "tf": _column(
        "tf",
        "tensorflow",
        {
            "transformers": Program("hf_tf", ("xla",), "hf457", _LEGACY),
            "transformers graph": Program("hf_tf", ("graph",), "hf457", _LEGACY),
        },
    ),
    "flax": _column(
        "flax",
        "jax",
        {
            "transformers": Program("hf_flax", (), "hf457"),
            "transformers jit": Program("hf_flax", ("jit",), "hf457"),
        },
    ),
}
TITLES = {"torch": "PyTorch", "tf": "TensorFlow", "flax": "JAX/Flax"}
PEERS = {
    "torch": "transformers 5.23",
    "tf": "transformers 4.57.1 under XLA",
    "flax": "transformers 4.57.1",
}

#: (job, column) -> group of peers -> how many times faster we want to be than its fastest.
TARGETS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("decode-1", "torch"): {"transformers": 3.0, "keras-hub": 4.0, "CTranslate2": 1.0},
    ("decode-1", "tf"): {"transformers": 1.3, "keras-hub": 1.4, "CTranslate2": 0.8},
    ("decode-1", "flax"): {"transformers": 5.0, "keras-hub": 1.35, "CTranslate2": 0.8},
    ("decode-8", "torch"): {"transformers": 2.5, "keras-hub": 4.5, "CTranslate2": 1.2},
    ("decode-8", "tf"): {"transformers": 1.6, "keras-hub": 2.0},
    ("decode-8", "flax"): {"transformers": 3.5, "keras-hub": 1.4},
    ("prefill", "torch"): {"transformers": 2.5, "CTranslate2": 1.3},
    ("prefill", "tf"): {"transformers": 1.05, "CTranslate2": 1.3},
    ("prefill", "flax"): {"transformers": 1.4, "CTranslate2": 1.3},
    ("int8", "torch"): {"transformers": 7.0, "CTranslate2": 1.5},
    ("int8", "tf"): {"transformers": 2.0, "CTranslate2": 1.5},
    ("int8", "flax"): {},
}
