# SPDX-License-Identifier: Apache-2.0
"""The logits processors on tensors, which can be written into."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from opt_core.generation import processors as p
from tests.backends.torch import BACKEND


def test_a_function_may_write_into_its_arguments() -> None:
    """As the reference's processors do; the logits are still to be recorded, and the tokens to be read."""

    def function(tokens: Tensor, scores: Tensor) -> Tensor:
        tokens[:], scores[:, 0] = 0, 5.0
        return scores

    scores, tokens = np.zeros((1, 2), np.float32), np.ones((1, 3), np.int64)
    processors = [p.UserDefined(function), p.RepetitionPenalty(0.5)]
    found = BACKEND.process(processors, scores, tokens, np.ones_like(tokens), 2, 1)
    assert found.tolist() == [[5.0, 0.0]]  # token 1 is the one that was seen
    assert not scores.any() and tokens.all()
