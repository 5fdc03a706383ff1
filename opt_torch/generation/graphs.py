# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: the kernels of a decoding step are launched as one.

One by one, launching them takes longer than a small model computes. A graph reads and writes the buffers
that it was recorded with, a cache among them; so what a step is given is copied there, unless it lies there
already, and what it gives is copied away. The cache's length must be a tensor: that of a static cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from opt_core.generation.plan import DecodePlan
from opt_core.generation.watching import Watch
from opt_torch.cache import KVCache
from opt_torch.generation.state import StepOutput
from opt_torch.parts import Linear

DEVICES = ("cuda",)
#: Calls before a recording, in which libraries choose their kernels and take their memory.
WARM_UPS = 3
#: So many recordings of a model stay for later calls, each with a cache of its size.
KEPT = 4
#: Modules that compute the same whenever their weights lie at the same place.
OWN_MODULES = ("opt_torch.", "torch.nn.")

#: (tokens [B, T], attention_mask=, position_ids=, past_key_values=) -> logits, hidden states, cache
Forward = Callable[..., StepOutput]
Key = tuple[Any, ...]


class Recording:
    """A call of the model for tokens [B, 1], and the buffers that it works on: the first cache's."""

    def __init__(
        self,
        forward: Forward,
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: KVCache,
    ) -> None:
        self.tokens, self.position_ids = tokens.clone(), position_ids.clone()
        self.attention_mask = None if attention_mask is None else attention_mask.clone()
        self.length = torch.as_tensor(past_key_values.length).clone()
        self.layers = past_key_values.layers
        call = partial(
            forward,
            self.tokens,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            past_key_values=KVCache(self.layers, self.length),
        )
        self.replay, self.output = record(call, tokens.device)

    def __call__(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: KVCache,
    ) -> StepOutput:
        length: Any = past_key_values.length
        self.tokens.copy_(tokens)
        self.position_ids.copy_(position_ids)
        self.length.copy_(length)
        if self.attention_mask is not None and attention_mask is not None:
            self.attention_mask.copy_(attention_mask)
        if past_key_values.layers is not self.layers:
            for own, given in zip(self.layers, past_key_values.layers, strict=True):
                own.key.copy_(given.key)
                own.value.copy_(given.value)
        self.replay()
        logits, hidden_states, _ = self.output
        return StepOutput(logits.clone(), hidden_states.clone(), KVCache(self.layers, length + 1))


def record(
    call: Callable[[], StepOutput], device: torch.device
) -> tuple[Callable[[], None], StepOutput]:
    """Returns what computes the call again, and the output that it writes to."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
    return graph.replay, output


@contextmanager
def replayed(
    forward: Forward, model: nn.Module, plan: DecodePlan, watch: Watch | None
) -> Iterator[Forward]:
    """`forward` within this block, replayed where one token of each row follows a static cache.

    What was recorded for the same numbers of rows and columns is used again, as long as the weights lie
    where they lay.
    """
    if not can_record(model, plan, watch):
        yield forward
        return
    kept = recordings_of(model)
    used: dict[Key, Recording] = {}

    def run(tokens: Tensor, **arguments: Any) -> StepOutput:
        mask, cache = arguments["attention_mask"], arguments["past_key_values"]
        if tokens.shape[1] != 1 or not isinstance(cache.length, Tensor):
            return forward(tokens, **arguments)
        key: Key = (cache.layers[0].key.shape, mask is None, plan.dola_layers, *_modes())
        if key not in used:  # and no other call's, as long as this one runs
            known = kept.pop(key, None)
            used[key] = known or Recording(forward, tokens, **arguments)
        return used[key](tokens, **arguments)

    try:
        yield run
    finally:
        kept.update(used)
        for key in [*kept][:-KEPT]:
            del kept[key]


def can_record(model: Any, plan: DecodePlan, watch: Watch | None) -> bool:
    """Whether a step launches the same kernels each time, and nothing but these."""
    return (
        plan.is_static
        and not (watch is not None and watch.sees_layers)
        and not model.training
        and {parameter.device.type for parameter in model.parameters()} <= {*DEVICES}
        and not any(
            module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl
            for module in model.modules()
        )
    )


def recordings_of(model: nn.Module) -> dict[Key, Recording]:
    """Those of earlier calls, the latest last; none of a model that has changed since.

    What modules of others do may depend on more than weights: then nothing is kept.
    """
    if not all(type(module).__module__.startswith(OWN_MODULES) for module in model.modules()):
        return {}
    places = tuple(_places(model))
    if model not in _KEPT or _KEPT[model][0] != places:
        _KEPT[model] = (places, {})
    return _KEPT[model][1]


def forget(model: nn.Module) -> None:
    """Drops the recordings of a model."""
    _KEPT.pop(model, None)


_KEPT: WeakKeyDictionary[nn.Module, tuple[Key, dict[Key, Recording]]] = WeakKeyDictionary()


def _places(model: nn.Module) -> Iterator[Any]:
    """What a graph of the model depends on."""
    for module in model.modules():
        if isinstance(module, Linear):
            yield id(module.decoding_weight)
    for parameter in model.parameters():
        yield id(parameter)
        if type(parameter) is nn.Parameter and type(parameter.data) is Tensor:
            yield parameter.data_ptr()  # the same parameter may be given other data


def _modes() -> tuple[Any, ...]:
    """What a call computes in; tensors made in inference mode cannot be written outside of it."""
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return *autocast, torch.is_inference_mode_enabled()
