# SPDX-License-Identifier: Apache-2.0
"""The process of one framework: `python -m opt_zoo.worker` reads a `Request`, answers in JSON lines.

Events go to what was stdout when the process began; whatever libraries print goes to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import OPTError
from opt_zoo.backends import CausalLM, Framework
from opt_zoo.memory import peak_bytes

Send = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What the worker is to do: load a model, continue prompts, perhaps keep the prompts' logits.

    `inputs` are input_ids and attention_mask, [B, T] each. With `repeat`, generation runs twice, so
    that the second run shows the speed without compilation.
    """

    framework: Framework
    model: str
    inputs: dict[str, list[list[int]]]
    options: dict[str, Any]
    dtype: str | None = None
    logits_file: str | None = None
    batch_size: int | None = None
    repeat: bool = False

    def to_json(self) -> str:
        """The request as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(**{**values, "framework": Framework(values["framework"])})


def main() -> int:
    """Answers the request on stdin; an error meant for people is an event, any other a traceback."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)

        def send(event: str, **values: Any) -> None:
            channel.write(json.dumps({"event": event, **values}) + "\n")
            channel.flush()

        try:
            send("result", **answer(Request.from_json(sys.stdin.read()), send))
        except (OPTError, ImportError) as error:
            send("error", kind=type(error).__name__, message=str(error))
    return 0


def answer(request: Request, send: Send) -> dict[str, Any]:
    """Does what is asked, telling `send` about each stage; raises OPTError."""
    seconds: dict[str, float] = {}

    def timed(stage: str, function: Callable[[], Any]) -> Any:
        send("stage", name=stage)
        start = time.perf_counter()
        result = function()
        seconds[stage] = time.perf_counter() - start
        return result

    timed("import", lambda: CausalLM.model_class(request.framework))
    model = timed("load", lambda: CausalLM.load(request.framework, request.model, request.dtype))
    sequences = timed("first run", lambda: generate(model, request, send))
    if request.repeat:
        sequences = timed("second run", lambda: generate(model, request, send))
    if request.logits_file is not None:
        logits = timed("logits", lambda: model.logits(request.inputs))
        np.save(Path(request.logits_file), logits)
    return {"sequences": sequences, "seconds": seconds, "peak_bytes": peak_bytes()}


def generate(model: CausalLM, request: Request, send: Send) -> list[list[int]]:
    """The sequences of all rows, batch by batch, telling `send` how many rows are done."""
    sequences: list[list[int]] = []
    total = len(request.inputs["input_ids"])
    size = request.batch_size or total
    for batch in _batches(request.inputs, size):
        sequences += model.generate(batch, request.options).tolist()
        send("progress", done=min(len(sequences), total), total=total)
    return sequences[:total] if request.batch_size else sequences


def _batches(inputs: dict[str, list[list[int]]], size: int) -> Iterator[dict[str, Any]]:
    """Batches of exactly `size` rows, so that one compilation serves all; the last repeats its end."""
    arrays: dict[str, NDArray[np.int64]] = {k: np.asarray(v, np.int64) for k, v in inputs.items()}
    total = len(inputs["input_ids"])
    for start in range(0, total, size):
        rows = np.minimum(np.arange(start, start + size), total - 1)
        yield {key: array[rows] for key, array in arrays.items()}


if __name__ == "__main__":
    sys.exit(main())
