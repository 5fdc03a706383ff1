# SPDX-License-Identifier: Apache-2.0
"""Training in fewer bits: autocast, and float32 products of numbers rounded to bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from opt_torch import OPTForCausalLM
from tests.cases import case

IDS = torch.randint(3, 90, (8, 7), generator=torch.Generator().manual_seed(0))
CASES = ("pre_norm", "post_norm", "untied_gelu")


def load(name: str) -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(case(name).folder, dropout=0.0).train()


def gradient(model: OPTForCausalLM) -> Tensor:
    """All gradients in one row."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def cosine(model: OPTForCausalLM, expected: OPTForCausalLM) -> float:
    return float(torch.cosine_similarity(gradient(model), gradient(expected), dim=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Logits have 16 bits; the loss, weights and gradients have 32."""
    model, expected = load(name), load(name)
    with torch.autocast("cpu", dtype):
        output = model(IDS, labels=IDS)
    output.loss.backward()
    plain = expected(IDS, labels=IDS)
    plain.loss.backward()
    assert (output.logits.dtype, output.loss.dtype) == (dtype, torch.float32)
    assert {p.dtype for p in model.parameters()} == {gradient(model).dtype} == {torch.float32}
    torch.testing.assert_close(output.loss, plain.loss, rtol=0.01, atol=0)
    assert cosine(model, expected) > 0.99 and not torch.equal(gradient(model), gradient(expected))


def test_autocast_learns() -> None:
    model = load("pre_norm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.fixture
def rounded_products() -> Iterator[None]:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("rounded_products")
@pytest.mark.parametrize("name", CASES)
def test_products_of_rounded_numbers(name: str) -> None:
    """All stays float32; processors that cannot do it faster do not round."""
    model, expected = load(name), load(name)
    output = model(IDS, labels=IDS)
    output.loss.backward()
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    plain = expected(IDS, labels=IDS)
    plain.loss.backward()
    assert output.logits.dtype == gradient(model).dtype == torch.float32
    torch.testing.assert_close(output.loss, plain.loss, rtol=0.01, atol=0)
    assert cosine(model, expected) > 0.99
