# SPDX-License-Identifier: Apache-2.0
"""accelerate's training loop, and what a batch is made of: parts, or the rows of several processes."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from opt_torch import OPTForCausalLM
from opt_torch.losses import count_labels
from tests.cases import case

FOLDER = case("pre_norm").folder
IDS = torch.randint(3, 103, (8, 7), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(7) < 2, -100)  # as many in each row
UNEQUAL = LABELS.masked_fill((torch.arange(8)[:, None] % 4 < 2) & (torch.arange(7) < 6), -100)
RATE = 0.1


def load() -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(FOLDER, dropout=0.0).train()


def step(model: nn.Module, ids: Tensor, labels: Tensor, parts: int = 1, processes: int = 1) -> None:
    """One step of SGD on the gradients of a batch, or of its parts, in one process or several."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    total = count_labels(labels)
    if processes > 1:  # whose mean DistributedDataParallel takes
        torch.distributed.all_reduce(total)
        total = total / processes
    for some, wanted in zip(ids.chunk(parts), labels.chunk(parts), strict=True):
        loss = model(input_ids=some, labels=wanted).loss
        (loss * count_labels(wanted) / total).backward()
    optimizer.step()


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    moved = 0.0
    for (name, value), other, start in zip(
        model.named_parameters(), expected.parameters(), load().parameters(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)
        moved += float((value - start).detach().abs().max())
    assert moved > 0.1


@pytest.fixture(scope="module")
def whole() -> OPTForCausalLM:
    """The model after a step on all rows."""
    return trained(LABELS)


def trained(labels: Tensor) -> OPTForCausalLM:
    model = load()
    step(model, IDS, labels)
    return model


@pytest.mark.parametrize("parts", [2, 8])
def test_parts_of_a_batch_are_the_batch(parts: int, whole: OPTForCausalLM) -> None:
    model = load()
    step(model, IDS, LABELS, parts)
    assert_same(model, whole)


def test_parts_of_unequal_weight_are_not() -> None:
    """A mean of means is another loss: each part weighs as many labels as count in it."""
    expected, means, sums = trained(UNEQUAL), load(), load()
    optimizer = torch.optim.SGD(means.parameters(), lr=RATE)
    for ids, wanted in zip(IDS.chunk(4), UNEQUAL.chunk(4), strict=True):
        (means(ids, labels=wanted).loss / 4).backward()
    optimizer.step()
    with pytest.raises(AssertionError):
        assert_same(means, expected)
    step(sums, IDS, UNEQUAL, parts=4)
    assert_same(sums, expected)


def test_a_loop_of_accelerate(tmp_path: Path) -> None:
    """Prepared model, optimizer and loader; the gradients of two batches make one step.

    accelerate divides by their number, so each weighs what it has of the mean number of labels.
    """
    whole = trained(UNEQUAL)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model: Any = load()
    rows = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])  # few labels, then many
    mean = count_labels(UNEQUAL) / 2
    loader = DataLoader(TensorDataset(IDS[rows], UNEQUAL[rows]), batch_size=4)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=RATE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for ids, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(ids, labels=labels).loss * count_labels(labels) / mean)
            optimizer.step()
            optimizer.zero_grad()
    found = accelerator.unwrap_model(model)
    assert_same(found, whole)
    found.save_pretrained(tmp_path)
    assert_same(OPTForCausalLM.from_pretrained(tmp_path), whole)


def one_of_two(rank: int, port: int, folder: str) -> None:
    """A process that sees some of the rows, and writes what it has learnt."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    model = load()
    rows = [slice(0, 2), slice(2, 8)][rank]  # few labels, and many
    step(DistributedDataParallel(model), IDS[rows], UNEQUAL[rows], processes=2)
    model.save_pretrained(Path(folder) / str(rank))
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    """DDP takes the mean of the processes' gradients: each weighs its share of all labels."""
    whole = trained(UNEQUAL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, str(tmp_path)), nprocs=2)
    for rank in ("0", "1"):
        assert_same(OPTForCausalLM.from_pretrained(tmp_path / rank), whole)
