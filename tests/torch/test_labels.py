# SPDX-License-Identifier: Apache-2.0
"""A classifier that is loaded with another number of labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opt_core import CheckpointError
from opt_torch import OPTForSequenceClassification
from tests.cases import case


def test_another_number_of_labels(tmp_path: Path) -> None:
    config = case("pre_norm").config.replace(num_labels=3)
    torch.manual_seed(0)
    model = OPTForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"score.weight: expected \(5, 24\).*found \(3, 24\)"):
        OPTForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    again = OPTForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    assert again.config.num_labels == 5 and again.score.weight.shape == (5, 24)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert 0 < again.score.weight.std() < 0.1
