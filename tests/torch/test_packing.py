# SPDX-License-Identifier: Apache-2.0
"""Packed rows in a compiled program, which reads no values."""

from __future__ import annotations

import pytest
import torch

from opt_torch import OPTForCausalLM
from tests.backends.base import CPU_KERNELS
from tests.cases import case

POSITIONS = torch.tensor([[-1, 0, 1, 2, 0, 1, -1, -1], [0, 1, 2, 3, 0, 1, 2, 3]])
MASK = (POSITIONS >= 0).long()
IDS = torch.randint(3, 103, (2, 8), generator=torch.Generator().manual_seed(0)) * MASK + 1 - MASK
LABELS = IDS.masked_fill(POSITIONS < 1, -100)
TEXTS = [(0, slice(1, 4)), (0, slice(4, 6)), (1, slice(0, 4)), (1, slice(4, 8))]


@pytest.mark.filterwarnings("ignore:attn_implementation=")
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_texts_in_a_compiled_program(kernel: str) -> None:
    """Logits and gradients, and of rows of one text in the same program; it has no graph breaks."""
    torch.compiler.reset()
    model = OPTForCausalLM.from_pretrained(case("pre_norm").folder, attn_implementation=kernel)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    options = {"attention_mask": MASK, "labels": LABELS}

    def gradients() -> list[torch.Tensor]:
        found = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        return found

    output = compiled(IDS, position_ids=POSITIONS, **options)
    output.loss.backward()
    found = gradients()
    loss, count = torch.tensor(0.0), int((LABELS != -100).sum())
    for row, columns in TEXTS:
        ids = IDS[row : row + 1, columns]
        alone = model(ids, labels=ids)
        torch.testing.assert_close(output.logits[row, columns], alone.logits[0])
        loss = loss + alone.loss * (ids.shape[1] - 1) / count
    torch.testing.assert_close(output.loss, loss)
    loss.backward()
    for gradient, expected in zip(found, gradients(), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    counted = MASK.cumsum(1).masked_fill(MASK == 0, 0) - 1
    again = compiled(IDS, position_ids=counted, **options).logits
    torch.testing.assert_close(again[MASK == 1], model(IDS, MASK).logits[MASK == 1])
