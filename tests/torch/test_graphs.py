# SPDX-License-Identifier: Apache-2.0
"""Decoding by CUDA graphs without a GPU: a recording that computes again stands for them.

Like a graph it reads and writes nothing but the buffers that it was made with, and no host is asked.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from opt_core import OPTConfig
from opt_core.generation import processors as p
from opt_core.generation.plan import DecodePlan
from opt_core.generation.strategies import Search
from opt_torch import OPTForCausalLM
from opt_torch.generation import graphs, search
from opt_torch.generation.state import DecodeState, StepOutput

CONFIG = OPTConfig(
    vocab_size=60,
    hidden_size=16,
    num_attention_heads=2,
    num_hidden_layers=2,
    ffn_dim=32,
    max_position_embeddings=400,
    init_std=0.3,
)
STATIC = {"cache_implementation": "static", "max_new_tokens": 9}


class Recorder:
    """Counts recordings and what is replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(
        self, call: Callable[[], StepOutput], device: torch.device
    ) -> tuple[Callable[[], None], StepOutput]:
        for _ in range(graphs.WARM_UPS):
            call()
        output = call()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            found = call()
            output.logits.copy_(found.logits)
            output.hidden_states.copy_(found.hidden_states)

        return replay, output


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(graphs, "record", found.record)
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    return found


@pytest.fixture
def model() -> OPTForCausalLM:
    torch.manual_seed(0)
    return OPTForCausalLM(CONFIG).eval()


def prompts(length: int, rows: int = 2) -> torch.Tensor:
    ids = torch.arange(rows * length).reshape(rows, length) * 7 % 50 + 5
    ids[0, 0] = CONFIG.pad_token_id
    return ids


STRATEGIES = [
    {},
    {"do_sample": True, "seed": 3, "num_return_sequences": 3, "top_k": 20, "top_p": 0.8},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    {"penalty_alpha": 0.6, "top_k": 3},
    {"penalty_alpha": 0.6, "top_k": 3, "low_memory": True},
    {"guidance_scale": 1.5},
    {"prompt_lookup_num_tokens": 3},
    {"dola_layers": "low", "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("options", STRATEGIES, ids=str)
def test_the_tokens_are_the_same(
    model: OPTForCausalLM, recorder: Recorder, options: dict[str, Any]
) -> None:
    """One after another, so that the buffers hold what an earlier call has left."""
    calls = [prompts(3), prompts(9), prompts(20)[1:], prompts(3)]
    plain = [model.generate(ids, max_new_tokens=9, **options) for ids in calls]
    assert not recorder.recorded
    found = [model.generate(ids, **options, **STATIC) for ids in calls]
    assert [x.tolist() for x in found] == [x.tolist() for x in plain]
    assert 0 < recorder.recorded <= 4 and recorder.replayed > 5


class Operations(TorchDispatchMode):
    """The operations that launch a kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [output.alias_info for output in op._schema.returns]
        if not any(alias and not alias.is_write for alias in aliases):  # which views would have
            self.names.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


def test_what_a_layer_computes_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the same for all layers is computed once: each launch takes as long as a small product."""
    found = []

    def record(call: Callable[[], StepOutput], device: torch.device) -> Any:
        with Operations() as operations:
            output = call()
        found.append(operations.names)
        return call, output

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    for count in (1, 2):
        model = OPTForCausalLM(CONFIG.replace(num_hidden_layers=count)).eval()
        model.generate(prompts(3), **STATIC)
    one, two = map(Counter, found)
    assert sum((two - one).values()) == 16, two - one
    assert not one - two


def test_embeddings_and_a_cache(model: OPTForCausalLM, recorder: Recorder) -> None:
    ids = prompts(6)[1:]
    plain = model.generate(ids, max_new_tokens=9)
    embeds = model.get_input_embeddings()(ids)
    past = model(ids[:, :4]).past_key_values
    for _ in range(2):
        found = model.generate(inputs_embeds=embeds, **STATIC)
        again = model.generate(ids, past_key_values=past, **STATIC)
        assert found.tolist() == plain[:, 6:].tolist() and again.tolist() == plain.tolist()
    assert recorder.recorded == 1


def test_one_recording_for_each_bucket(model: OPTForCausalLM, recorder: Recorder) -> None:
    for length in (2, 5, 31, 8):
        model.generate(prompts(length), **STATIC)
    assert (recorder.recorded, recorder.replayed) == (1, 4 * 8)
    model.generate(prompts(2, rows=3), **STATIC)
    assert recorder.recorded == 2
    for rows in range(4, 4 + graphs.KEPT):
        model.generate(prompts(2, rows=rows), **STATIC)
    model.generate(prompts(2), **STATIC)
    assert recorder.recorded == 3 + graphs.KEPT, "the oldest of all was dropped"


def test_a_call_within_another_has_its_own(model: OPTForCausalLM, recorder: Recorder) -> None:
    """A streamer that generates itself, with the same numbers of rows and columns."""
    plain = model.generate(prompts(3)[1:], max_new_tokens=9).tolist()
    found = []

    class Streamer:
        def put(self, tokens: Any) -> None:
            if len(found) < 3:
                found.append(model.generate(prompts(3)[1:], **STATIC).tolist())

        def end(self) -> None:
            pass

    assert model.generate(prompts(3)[1:], streamer=Streamer(), **STATIC).tolist() == plain
    assert found == [plain] * 3


def test_other_weights(model: OPTForCausalLM, recorder: Recorder) -> None:
    """Changed where they lie, they are read anew; at another place, recorded anew."""
    torch.manual_seed(1)
    other = OPTForCausalLM(CONFIG).eval()
    expected = other.generate(prompts(3), max_new_tokens=9).tolist()
    assert model.generate(prompts(3), **STATIC).tolist() != expected
    model.load_state_dict(other.state_dict())
    assert model.generate(prompts(3), **STATIC).tolist() == expected
    assert recorder.recorded == 1
    model.double()
    model.float()
    assert model.generate(prompts(3), **STATIC).tolist() == expected
    assert recorder.recorded == 2
    model.prepare_for_decoding(batch_size=8)
    assert model.generate(prompts(3), **STATIC).tolist() == expected
    assert recorder.recorded == 3


def test_inference_mode(model: OPTForCausalLM, recorder: Recorder) -> None:
    """Whose tensors cannot be written outside of it."""
    plain = model.generate(prompts(3), max_new_tokens=9).tolist()
    with torch.inference_mode():
        assert model.generate(prompts(3), **STATIC).tolist() == plain
    assert model.generate(prompts(3), **STATIC).tolist() == plain
    assert recorder.recorded == 2


def test_adapters_are_recorded_for_one_call(model: OPTForCausalLM, recorder: Recorder) -> None:
    """They may be switched off without a weight that moves."""
    plain = model.generate(prompts(3), max_new_tokens=9).tolist()
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["fc1"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).eval()
    expected = adapted.generate(prompts(3), max_new_tokens=9).tolist()
    assert adapted.generate(prompts(3), **STATIC).tolist() == expected != plain
    with adapted.disable_adapter():
        assert adapted.generate(prompts(3), **STATIC).tolist() == plain
    assert recorder.recorded == 2


def test_what_is_not_recorded(
    model: OPTForCausalLM, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.generate(prompts(3), max_new_tokens=9)  # a cache whose length is a number
    hook = model.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: None)
    model.generate(prompts(3), **STATIC)
    hook.remove()
    model.train()
    model.generate(prompts(3), **STATIC)
    model.eval()
    monkeypatch.setattr(graphs, "DEVICES", ("cuda",))
    model.generate(prompts(3), **STATIC)
    assert not recorder.recorded


def test_nothing_outlives_the_model(recorder: Recorder) -> None:
    """Nor hinders copying it."""
    model = OPTForCausalLM(CONFIG).eval()
    model.generate(prompts(3), **STATIC)
    copy.deepcopy(model).generate(prompts(3), **STATIC)
    assert recorder.recorded == 2
    for recording in graphs.recordings_of(model).values():
        recording.replay = None  # the stand-in of a graph refers to the model: a graph does not
    found = weakref.ref(model)
    del model, recording
    gc.collect()
    assert found() is None


PROCESSORS = (
    p.RepetitionPenalty(1.2),
    p.MinNewTokens(3, (2,)),
    p.NoRepeatNGram(2),
    p.Suppress((5, 9)),
    p.SequenceBias((((4, 7), -2.0), ((8,), 1.0))),
    p.ForcedEOS((2,)),
    p.Temperature(0.7),
    p.TopK(20),
    p.TopP(0.9),
)


@pytest.mark.parametrize("do_sample", [False, True])
def test_no_step_asks_the_host(do_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no values, each question for one is an error."""
    monkeypatch.setattr(search, "columns_until_end", lambda plan, tokens: tokens.shape[1])
    plan = DecodePlan(Search(do_sample), PROCESSORS, 4, 12, (2, 3), 1, is_static=True)
    with torch.device("meta"):
        state = DecodeState(
            tokens=torch.zeros((2, 16), dtype=torch.long),
            mask=torch.ones((2, 16), dtype=torch.long),
            length=4,
            prompt_length=4,
            offset=0,
            limit=12,
            finished=torch.zeros(2, dtype=torch.bool),
            logits=torch.zeros((2, 60)),
            cache=OPTForCausalLM(CONFIG).init_cache(2, 16),
        )
        output = StepOutput(torch.zeros((2, 1, 60)), None, state.cache)
        noise = torch.zeros((12, 2, 60)) if do_sample else None
    draw = None if noise is None else noise.__getitem__
    found = search.search(plan, state, lambda tokens, cache: output, draw, None)
    assert found.tokens.shape == (2, 12) and found.length == 12


@pytest.mark.parametrize("limit", [5, 16, 40])
def test_the_end_is_noticed_later(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator: what follows it is dropped."""
    torch.manual_seed(0)
    model = OPTForCausalLM(CONFIG).eval()
    lengths = set()
    for seed in range(6):
        options = {"do_sample": True, "seed": seed, "eos_token_id": [*range(20, 28)]}
        options |= {"max_new_tokens": limit, "temperature": 3.0}
        expected = model.generate(prompts(4), **options).tolist()
        with monkeypatch.context() as patch:
            patch.setattr(search, "AT_HAND", ())
            assert model.generate(prompts(4), **options).tolist() == expected
        lengths.add(len(expected[0]))
    assert len(lengths) > 1
