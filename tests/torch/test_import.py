# SPDX-License-Identifier: Apache-2.0
"""`import opt_torch` loads little beside PyTorch: 0.2 s where the compiler alone would take 1.4."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: What it may load that `import torch` has not.
PACKAGES = {"opt_core", "opt_torch", "numpy", "ml_dtypes", "tokenizers"}
#: Parts of PyTorch that its newest version loads by itself.
OF_TORCH = {"torch.utils.checkpoint", "torch.nn.attention"}
USE = """
from opt_torch import OPTForCausalLM
model = OPTForCausalLM.from_pretrained("tests/golden/cases/pre_norm")
ids = torch.tensor([[2, 7, 9]])
model(ids, labels=ids).loss.backward()
for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
    model.generate(ids, max_new_tokens=2, **options)
model.prepare_for_decoding(batch_size=8)(ids)
"""


def loaded(code: str) -> set[str]:
    """The modules of a fresh process after this code."""
    code = f"import json, sys, torch\n{code}\nprint(json.dumps([*sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_loads_little_beside_torch() -> None:
    added = loaded("import opt_torch") - loaded("")
    assert "opt_torch" in added
    others = {name for name in added if name.split(".")[0] not in PACKAGES} - OF_TORCH
    assert {name for name in others if name.split(".")[0] not in sys.stdlib_module_names} == set()


def test_using_a_model_loads_no_compiler() -> None:
    """Loading, a step's loss and gradients, decoding, weights packed for it."""
    names = {"torch._dynamo", "torch._inductor", "torch.onnx", "sympy", "huggingface_hub"}
    assert not names & loaded(USE)
