# SPDX-License-Identifier: Apache-2.0
"""How often the embedded model is right about problems that it never saw."""

from __future__ import annotations

from opt_core.assets import TINY_SUMS, sums
from opt_zoo import processes
from opt_zoo.backends import Framework
from opt_zoo.processes import OnEvent
from opt_zoo.prompts import Prompts
from opt_zoo.worker import Request

BATCH_SIZE = 1001  # 4 x 1001 = 4004 problems: no row is computed for nothing
LONGEST_ANSWER = 8  # tokens, the end of sequence included; a longer answer is wrong anyway


def count() -> int:
    """The number of held-out problems."""
    return len(sums.problems("test"))


def accuracy(framework: Framework, on_event: OnEvent = lambda event: None) -> float:
    """The share of held-out problems answered rightly, in a process of its own; raises OPTError."""
    prompts, answers = zip(*sums.problems("test"), strict=True)
    batch = Prompts.encode(TINY_SUMS, prompts)
    request = Request(
        framework,
        str(TINY_SUMS),
        batch.inputs,
        {"max_new_tokens": LONGEST_ANSWER, "do_sample": False},
        batch_size=BATCH_SIZE,
    )
    reply = processes.run(request, on_event)
    return sums.accuracy(answers, batch.decode(batch.new_tokens(reply.sequences)))
