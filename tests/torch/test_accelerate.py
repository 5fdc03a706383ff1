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
from tests.cases import case

FOLDER = case("pre_norm").folder
IDS = torch.randint(3, 103, (8, 7), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(7) < 2, -100)  # as many in each row
RATE = 0.1


def load() -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(FOLDER, dropout=0.0).train()


def step(model: nn.Module, ids: Tensor, labels: Tensor, parts: int = 1) -> None:
    """One step of SGD on the gradients of a batch, or of its parts."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for some, wanted in zip(ids.chunk(parts), labels.chunk(parts), strict=True):
        (model(input_ids=some, labels=wanted).loss / parts).backward()
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
    model = load()
    step(model, IDS, LABELS)
    return model


@pytest.mark.parametrize("parts", [2, 8])
def test_parts_of_a_batch_are_the_batch(parts: int, whole: OPTForCausalLM) -> None:
    model = load()
    step(model, IDS, LABELS, parts)
    assert_same(model, whole)


def test_parts_of_unequal_weight_are_not() -> None:
    """A mean of means, as everywhere in PyTorch: divide the sums by what counts in all parts instead."""
    labels = LABELS.clone()
    labels[:4, :5] = -100
    expected, means, sums = load(), load(), load()
    step(expected, IDS, labels)
    step(means, IDS, labels, parts=2)
    with pytest.raises(AssertionError):
        assert_same(means, expected)
    optimizer = torch.optim.SGD(sums.parameters(), lr=RATE)
    count = (labels[:, 1:] != -100).sum()
    for ids, wanted in zip(IDS.chunk(2), labels.chunk(2), strict=True):
        own = (wanted[:, 1:] != -100).sum()
        (sums(ids, labels=wanted).loss * own / count).backward()
    optimizer.step()
    assert_same(sums, expected)


def test_a_loop_of_accelerate(whole: OPTForCausalLM, tmp_path: Path) -> None:
    """Prepared model, optimizer and loader; the gradients of two batches make one step."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model: Any = load()
    loader = DataLoader(TensorDataset(IDS, LABELS), batch_size=4)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=RATE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for ids, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(ids, labels=labels).loss)
            optimizer.step()
            optimizer.zero_grad()
    trained = accelerator.unwrap_model(model)
    assert_same(trained, whole)
    trained.save_pretrained(tmp_path)
    assert_same(OPTForCausalLM.from_pretrained(tmp_path), whole)


def one_of_two(rank: int, port: int, folder: str) -> None:
    """A process that sees every other row, and writes what it has learnt."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    model = load()
    step(DistributedDataParallel(model), IDS[rank::2], LABELS[rank::2])
    model.save_pretrained(Path(folder) / str(rank))
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_step_of_one(whole: OPTForCausalLM, tmp_path: Path) -> None:
    """DDP takes the mean of the processes' means: that of the batch, if as many labels count in each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, str(tmp_path)), nprocs=2)
    for rank in ("0", "1"):
        assert_same(OPTForCausalLM.from_pretrained(tmp_path / rank), whole)
