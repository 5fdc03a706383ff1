# SPDX-License-Identifier: Apache-2.0
"""The process of one framework: `python -m opt_zoo.worker` reads a `Request`, answers in JSON lines.

Events go to what was stdout when the process began; whatever libraries print goes to stderr. The
process ends when its stdin does: whoever asked is gone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import OPTError
from opt_core.tokenizer import OPTTokenizer
from opt_zoo.backends import CausalLM, Framework
from opt_zoo.memory import peak_bytes

REPEAT_SECONDS = 0.5
MOST_REPEATS = 10

Send = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What the worker is to do: load a model, continue prompts, perhaps keep the prompts' logits.

    `inputs` are input_ids and attention_mask, [B, T] each. With `repeat`, generation runs several
    times more, so that the best run shows the speed without compilation. With `stream`, each new
    token is an event. `assistant` names a smaller model, `tokenizer` that of stop strings.
    """

    framework: Framework
    model: str
    inputs: dict[str, list[list[int]]]
    options: dict[str, Any]
    dtype: str | None = None
    logits_file: str | None = None
    batch_size: int | None = None
    assistant: str | None = None
    tokenizer: str | None = None
    stream: bool = False
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

        _send_warnings(send)
        request = Request.from_json(sys.stdin.readline())
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        try:
            send("result", **answer(request, send))
        except (OPTError, ImportError) as error:
            send("error", kind=type(error).__name__, message=str(error))
    return 0


def _send_warnings(send: Send) -> None:
    """From now on, warnings meant for the user are events; all others go to stderr as ever."""
    show = warnings.showwarning

    def tell(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is UserWarning:
            send("warning", message=str(message))
        else:
            show(message, category, *where, **more)

    warnings.showwarning = tell


def _end_with_stdin() -> None:
    os.read(0, 1)  # nothing follows the request, so this returns when the other end closes
    os._exit(1)


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
    objects = timed("helpers", lambda: load_objects(request))
    streamer = {"streamer": EventStreamer(send)} if request.stream else {}
    sequences = timed("first run", lambda: generate(model, request, objects | streamer, send))
    if request.repeat:
        send("stage", name="more runs")
        seconds["best run"] = best_seconds(lambda: generate(model, request, objects, send))
    if request.logits_file is not None:
        logits = timed("logits", lambda: model.logits(request.inputs))
        _save(Path(request.logits_file), logits)
    return {"sequences": sequences, "seconds": seconds, "peak_bytes": peak_bytes()}


def load_objects(request: Request) -> dict[str, Any]:
    """What `generate` takes besides options: an assistant, a tokenizer; raises OPTError."""
    objects: dict[str, Any] = {}
    if request.assistant is not None:
        assistant = CausalLM.load(request.framework, request.assistant, request.dtype)
        objects["assistant_model"] = assistant.model
    if request.tokenizer is not None:
        objects["tokenizer"] = OPTTokenizer.from_pretrained(request.tokenizer)
    return objects


class EventStreamer:
    """Sends the prompt and each new token to whoever listens to the worker."""

    def __init__(self, send: Send) -> None:
        self.send = send

    def put(self, value: Any) -> None:
        self.send("tokens", tokens=np.asarray(value).tolist())

    def end(self) -> None:
        self.send("tokens", tokens=None)


def generate(
    model: CausalLM, request: Request, objects: dict[str, Any], send: Send
) -> list[list[int]]:
    """The sequences of all rows, batch by batch, telling `send` how many rows are done."""
    sequences: list[list[int]] = []
    total = len(request.inputs["input_ids"])
    size = request.batch_size or total
    for batch in _batches(request.inputs, size):
        sequences += model.generate(batch, request.options | objects).tolist()
        send("progress", done=min(len(sequences), total), total=total)
    return sequences[:total] if request.batch_size else sequences


def best_seconds(run: Callable[[], Any]) -> float:
    """The shortest of as many runs as half a second allows, at most ten and at least one."""
    durations: list[float] = []
    while len(durations) < MOST_REPEATS and sum(durations) < REPEAT_SECONDS:
        start = time.perf_counter()
        run()
        durations.append(time.perf_counter() - start)
    return min(durations)


def _save(file: Path, logits: NDArray[np.float32]) -> None:
    try:
        np.save(file, logits)
    except OSError as error:
        raise OPTError(
            f"{file.parent}: expected room for {logits.nbytes} bytes of logits, but writing them "
            f"failed ({error}). Free space there, or set TMPDIR to a directory that has it."
        ) from error


def _batches(inputs: dict[str, list[list[int]]], size: int) -> Iterator[dict[str, Any]]:
    """Batches of exactly `size` rows, so that one compilation serves all; the last repeats its end."""
    arrays: dict[str, NDArray[np.int64]] = {k: np.asarray(v, np.int64) for k, v in inputs.items()}
    total = len(inputs["input_ids"])
    for start in range(0, total, size):
        rows = np.minimum(np.arange(start, start + size), total - 1)
        yield {key: array[rows] for key, array in arrays.items()}


if __name__ == "__main__":
    sys.exit(main())
