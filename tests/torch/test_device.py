# SPDX-License-Identifier: Apache-2.0
"""Everything on an accelerator, which is pretended: nothing mixes devices, the numbers are the CPU's.

And the host waits for it no more often than it must: each wait leaves a GPU without work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opt_core import OPTConfig, PhrasalConstraint
from opt_torch import (
    KVCache,
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTModel,
    flash,
)
from opt_torch.generation import graphs
from tests.cases import case
from tests.torch.pretended import DEVICE, NAME, Generator, Pretence, pretended
from tests.torch.test_flash import here, vendor  # noqa: F401
from tests.torch.test_graphs import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:.*initialised anew", "ignore:.*said once")

KERNELS = ("eager", "sdpa", "flash_attention_2")
IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])


@pytest.fixture
def device() -> Iterator[Pretence]:
    with pretended() as pretence:
        yield pretence


@pytest.fixture
def kernels(vendor: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """FlashAttention in plain operations, on the device too."""
    monkeypatch.setattr(flash, "DEVICES", ("cpu", NAME))


def moved(value: Any) -> Any:
    """The same on the device."""
    if isinstance(value, dict):
        return {name: moved(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(moved(each) for each in value)
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).to(DEVICE)
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def tensors(value: Any) -> list[Tensor]:
    """Those of an output."""
    if isinstance(value, KVCache):
        value = [*value]
    elif hasattr(value, "keys"):
        value = [value[name] for name in value]
    if isinstance(value, tuple | list):
        return [tensor for each in value for tensor in tensors(each)]
    return [value] if isinstance(value, Tensor) else []


def assert_same(found: Any, expected: Any, error: float = 1e-6) -> None:
    """The same numbers, on the device."""
    pairs = [*zip(tensors(found), tensors(expected), strict=True)]
    assert pairs
    for mine, other in pairs:
        assert mine.device == DEVICE and other.device.type == "cpu"
        torch.testing.assert_close(mine.detach().cpu(), other.detach(), rtol=1e-5, atol=error)


# What is pretended.


def test_mixed_devices_are_an_error(device: Pretence) -> None:
    there, cpu = torch.arange(4, device=NAME), torch.arange(4)
    assert (there + 1)[1:].device == there.device == DEVICE and cpu.device.type == "cpu"
    for mixes in (
        lambda: there + cpu,
        lambda: torch.cat([there, cpu]),
        lambda: cpu[there],
        lambda: torch.where(there > 1, there, cpu),
        lambda: cpu.add_(there),
    ):
        with pytest.raises(RuntimeError, match="expected all tensors on one device, found pretend"):
            mixes()
    with pytest.raises(TypeError, match="can't convert pretend:0 device type tensor to numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="expected a generator of the device"):
        torch.empty(3, device=NAME).exponential_(generator=torch.Generator())
    torch.empty(3, device=NAME).exponential_(generator=torch.Generator(DEVICE))
    assert isinstance(torch.Generator(DEVICE), Generator) and device.waits == 0
    assert (there + torch.tensor(1)).tolist() == [1, 2, 3, 4]


def test_each_wait_counts(device: Pretence) -> None:
    there = torch.arange(4, device=NAME)
    for reads in (
        lambda: int(there[1]),
        lambda: bool((there > 1).any()),
        lambda: there.tolist(),
        lambda: there.cpu(),
        lambda: there[there > 1],
        lambda: there.nonzero(),
        lambda: torch.equal(there, there),
        lambda: torch.zeros(4, dtype=torch.long).copy_(there),
    ):
        before = device.reads, device.sends
        reads()
        assert (device.reads, device.sends) == (before[0] + 1, before[1])
    for sends in (
        lambda: torch.tensor([1, 2], device=NAME),
        lambda: torch.zeros(4).to(there),
        lambda: there.copy_(torch.zeros(4)),
        lambda: there[torch.tensor([1])],
    ):
        before = device.reads, device.sends
        sends()
        assert (device.reads, device.sends) == (before[0], before[1] + 1)


def test_parameters_are_plain(device: Pretence) -> None:
    model = OPTForCausalLM(OPTConfig(**SMALL)).to(DEVICE)
    assert {type(p) for p in model.parameters()} == {torch.nn.Parameter}
    assert {p.device for p in model.parameters()} == {model.device} == {DEVICE}
    assert type(model.lm_head.weight.data) is Tensor
    assert copy.deepcopy(model).device == DEVICE and not model.lm_head.weight.is_cpu


SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "ffn_dim": 32,
    "max_position_embeddings": 200,
    "init_std": 0.3,
}

# Calls of the models.

CALLS: dict[str, dict[str, Any]] = {
    "ids": {"input_ids": IDS},
    "left": {"input_ids": IDS, "attention_mask": MASK},
    "right": {"input_ids": IDS, "attention_mask": RIGHT},
    "texts": {"input_ids": IDS, "position_ids": POSITIONS},
    "embeds": {
        "inputs_embeds": torch.linspace(-1, 1, 2 * 7 * 24).reshape(2, 7, 24),
        "attention_mask": MASK,
    },
    "heads": {"input_ids": IDS, "head_mask": torch.linspace(0, 1, 12).reshape(3, 4)},
    "all": {
        "input_ids": IDS,
        "attention_mask": MASK,
        "output_attentions": True,
        "output_hidden_states": True,
    },
    "tuple": {"input_ids": IDS, "use_cache": False, "return_dict": False},
}
LABELS: dict[type, list[dict[str, Any]]] = {
    OPTModel: [{}],
    OPTForCausalLM: [{}, {"labels": IDS.masked_fill(MASK * RIGHT == 0, -100)}],
    OPTForSequenceClassification: [
        {"labels": torch.tensor([1, 0])},
        {"labels": torch.tensor([[0.0, 1.0], [1.0, 1.0]])},
    ],
    OPTForQuestionAnswering: [
        {"start_positions": torch.tensor([1, 9]), "end_positions": torch.tensor([3, 2])}
    ],
}
#: For how many values a call waits: whether a mask or positions say anything; where packed tokens lie.
READS = {"left": 1, "right": 1, "texts": 1, "embeds": 1, "all": 1}


def load(kind: Any, kernel: str = "sdpa", **options: Any) -> Any:
    """A model on the CPU, whose fresh head is drawn from a seed."""
    torch.manual_seed(0)
    return kind.from_pretrained(case("pre_norm").folder, attn_implementation=kernel, **options)


def assert_alike(plain: Any, there: Any, arguments: dict[str, Any], device: Pretence) -> int:
    """Calls both; returns how often the host waited for the one on the device."""
    given = moved(arguments)
    device.reads = device.sends = 0
    found = there(**given)
    waits = device.waits
    assert_same(found, plain(**arguments))
    return waits


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", LABELS, ids=lambda kind: kind.__name__)
def test_calls(kind: Any, kernel: str, device: Pretence, kernels: None) -> None:
    """Outputs and losses, and how often the host waits: not for labels."""
    for labels in LABELS[kind]:
        plain = load(kind, kernel)
        there = moved(plain)
        for name, arguments in CALLS.items():
            waits = assert_alike(plain, there, {**arguments, **labels}, device)
            assert waits == READS.get(name, 0) or kernel == "flash_attention_2", name


@pytest.mark.parametrize("kernel", KERNELS)
def test_caches(kernel: str, device: Pretence, kernels: None) -> None:
    """Growing, as pairs, and fixed, with a length that is a number or a tensor."""
    plain = load(OPTForCausalLM, kernel)
    there = moved(plain)
    for mask in (None, MASK):
        for kind in ("growing", "pairs", "fixed", "static"):
            outputs = []
            for model in (there, plain):
                put: Any = moved if model is there else lambda value: value
                past = None if kind in ("growing", "pairs") else model.init_cache(2, 10)
                if kind == "static":
                    past = KVCache(
                        past.layers, torch.zeros((), dtype=torch.long, device=model.device)
                    )
                found = []
                for start, end in ((0, 4), (4, 6), (6, 7)):
                    given = {} if mask is None else {"attention_mask": put(mask[:, :end])}
                    output = model(put(IDS[:, start:end]), past_key_values=past, **given)
                    past = output.past_key_values
                    past = tuple(past) if kind == "pairs" else past
                    found.append(output.logits)
                outputs.append([*found, *tensors(past)])
            assert_same(*outputs)


# Training.


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_steps(kernel: str, masked: bool, device: Pretence, kernels: None) -> None:
    """AdamW on the gradients, with and without checkpointing: without waiting, but for what a mask says."""
    batch = {"input_ids": IDS, "labels": IDS.masked_fill(MASK * RIGHT == 0, -100)}
    batch |= {"attention_mask": MASK} if masked else {}
    plain = load(OPTForCausalLM, kernel, dropout=0.0).train()
    there = moved(plain)
    for model, given in ((plain, batch), (there, moved(batch))):
        # A key's bias changes nothing: its gradient is noise, and without epsilon, so were its step.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
        for step in range(3):
            if step == 1:
                model.gradient_checkpointing_enable()
            device.reads = device.sends = 0
            optimizer.zero_grad()
            model(**given).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            assert device.waits == (masked and model is there) or kernel == "flash_attention_2"
        model.gradient_checkpointing_disable()
    assert_same([*there.parameters()], [*plain.parameters()], 1e-5)
    assert_same([p.grad for p in there.parameters()], [p.grad for p in plain.parameters()])


def test_dropout_and_layerdrop(device: Pretence) -> None:
    """Drawn on the device; checkpointing draws the same again."""
    model = load(OPTForCausalLM, dropout=0.3, layerdrop=0.3).to(DEVICE).train()
    ids, gradients = IDS.to(DEVICE), []
    for _ in range(2):
        torch.manual_seed(3)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append(
            {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        )
        model.gradient_checkpointing_enable()
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_labels_may_lie_on_the_cpu(device: Pretence) -> None:
    """As in the reference, whose loss brings them to the logits."""
    there = moved(load(OPTForCausalLM))
    ids = IDS.to(DEVICE)
    torch.testing.assert_close(there(ids, labels=IDS).loss.cpu(), there(ids, labels=ids).loss.cpu())


# Loading, saving and changing.


def test_there_and_back(device: Pretence, tmp_path: Path) -> None:
    plain = load(OPTForCausalLM)
    there = OPTForCausalLM.from_pretrained(case("pre_norm").folder).to(NAME)
    mapped = OPTForCausalLM.from_pretrained(case("pre_norm").folder, device_map=NAME)
    for number, model in enumerate((there, mapped, moved(plain))):
        assert (
            model.device == DEVICE and model.lm_head.weight is model.get_input_embeddings().weight
        )
        for safe in (True, False):
            folder = tmp_path / f"{number}-{safe}"
            model.save_pretrained(folder, safe_serialization=safe)
            again = OPTForCausalLM.from_pretrained(folder)
            assert again.state_dict().keys() == plain.state_dict().keys()
            assert all(map(torch.equal, again.parameters(), plain.parameters()))
    assert all(map(torch.equal, there.to("cpu").parameters(), plain.parameters()))
    assert there.device.type == "cpu"


def test_states_and_dtypes(device: Pretence, tmp_path: Path) -> None:
    plain = load(OPTForCausalLM)
    there = moved(plain).to(torch.bfloat16)
    assert there.dtype == torch.bfloat16 and there.device == DEVICE
    assert_same(there(IDS.to(DEVICE)), copy.deepcopy(plain).to(torch.bfloat16)(IDS))
    there = there.float()
    there.load_state_dict(plain.state_dict())
    torch.save(there.state_dict(), tmp_path / "state")
    read = torch.load(tmp_path / "state", weights_only=True)
    assert_same(there(IDS.to(DEVICE)), plain(IDS))
    assert all(map(torch.equal, read.values(), plain.state_dict().values()))
    assert_same(moved(there.eval())(IDS.to(DEVICE)), plain(IDS))
    there.prepare_for_decoding(batch_size=8)  # which packs nothing there
    assert all(
        module.decoding_weight is None
        for module in there.modules()
        if hasattr(module, "decoding_weight")
    )


@pytest.mark.parametrize("name", ["pre_norm", "untied_gelu"])
def test_resizing(name: str, device: Pretence) -> None:
    there = OPTForCausalLM.from_pretrained(case(name).folder).to(DEVICE)
    before = there.get_input_embeddings().weight.cpu()
    there.resize_token_embeddings(120)
    there.tie_weights()
    tables = there.get_input_embeddings().weight, there.lm_head.weight
    assert (tables[0] is tables[1]) == there.config.tie_word_embeddings
    assert {(x.device, x.shape[0]) for x in tables} == {(DEVICE, 120)}
    assert torch.equal(tables[0][: len(before)].cpu(), before)
    assert there(IDS.to(DEVICE)).logits.shape[-1] == 120


# Decoding.


class Told:
    """A streamer, a criterion, a processor and a rule for prefixes, and what they were told."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Any) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")

    def stops(self, ids: Tensor, scores: Tensor) -> Tensor:
        return ids[:, -1] % 3 == 0

    def processes(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores - 0.5 * torch.nn.functional.one_hot(ids[:, -1], scores.shape[-1])

    def allows(self, batch: int, ids: Any) -> list[int]:
        return list(range(int(ids[-1]) % 2, 99, 2))


def hooks(*names: str) -> Callable[[Told], dict[str, Any]]:
    every = {
        "streamer": lambda told: told,
        "stopping_criteria": lambda told: [told.stops],
        "logits_processor": lambda told: [told.processes],
        "prefix_allowed_tokens_fn": lambda told: told.allows,
    }
    return lambda told: {name: every[name](told) for name in names}


NEW = 6
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {
        "do_sample": True,
        "seed": 3,
        "top_k": 20,
        "top_p": 0.9,
        "num_return_sequences": 2,
    },
    "noise": {"do_sample": True, "noise": torch.linspace(0, 3, NEW * 2 * 103).reshape(NEW, 2, 103)},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True, "seed": 3},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3},
    "low memory": {"penalty_alpha": 0.6, "top_k": 3, "low_memory": True},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "layers": {"dola_layers": "high", "repetition_penalty": 1.2},
    "guided": {"guidance_scale": 1.5},
    "negative": {
        "guidance_scale": 1.5,
        "negative_prompt_ids": IDS[:, :3],
        "negative_prompt_attention_mask": MASK[:, :3],
    },
    "guided beams": {"guidance_scale": 1.5, "num_beams": 3},
    "words": {"force_words_ids": [[5, 6]], "num_beams": 3},
    "constraints": {"constraints": [PhrasalConstraint([7, 8])], "num_beams": 3},
    "processors": {
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.3,
        "encoder_repetition_penalty": 1.1,
        "bad_words_ids": [[5], [6, 7]],
        "sequence_bias": {(8,): 2.0},
        "min_new_tokens": 3,
        "suppress_tokens": [9],
        "begin_suppress_tokens": [10],
        "forced_bos_token_id": 11,
        "forced_eos_token_id": 2,
        "exponential_decay_length_penalty": (2, 1.1),
        "renormalize_logits": True,
        "remove_invalid_values": True,
    },
    "sampling's processors": {
        "do_sample": True,
        "seed": 1,
        "temperature": 0.7,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.001,
        "typical_p": 0.95,
        "epsilon_cutoff": 1e-4,
        "eta_cutoff": 1e-4,
    },
    "no mask": {"attention_mask": None},
    "on the right": {"attention_mask": RIGHT},
    "embeds": {
        "inputs_embeds": torch.linspace(-1, 1, 2 * 7 * 24).reshape(2, 7, 24),
        "input_ids": None,
    },
    "past": {"past_key_values": 4, "attention_mask": None},
}
RECORDED = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Stands for CUDA's graphs, on the device too."""
    found = Recorder()
    monkeypatch.setattr(graphs, "record", found.record)
    monkeypatch.setattr(graphs, "DEVICES", (NAME,))
    return found


def generate(model: Any, put: Callable[[Any], Any], options: dict[str, Any]) -> Any:
    """Six tokens after two prompts, one of them with pads."""
    given = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": NEW, **options}
    if "past_key_values" in given:
        given["past_key_values"] = model(put(IDS[:, : given["past_key_values"]])).past_key_values
    return model.generate(
        **put({name: value for name, value in given.items() if value is not None})
    )


@pytest.mark.parametrize("name", DECODING)
def test_decoding(name: str, device: Pretence, recorder: Recorder) -> None:
    """By itself, on a static cache, and with all that can be recorded."""
    plain = load(OPTForCausalLM, "eager")
    there = moved(plain)
    for more in ({}, {"cache_implementation": "static"}, RECORDED):
        options = {**DECODING[name], **more}
        if more is RECORDED and name == "lookup":
            options |= {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
        found, expected = generate(there, moved, options), generate(plain, lambda x: x, options)
        assert_same(found, expected)
        if more is RECORDED and "beam" in name:
            scores = [
                model.compute_transition_scores(x.sequences, x.scores, x.beam_indices, True)
                for model, x in ((there, found), (plain, expected))
            ]
            torch.testing.assert_close(*scores)
    torch.testing.assert_close(found.sequences.cpu(), expected.sequences)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["greedy", "beams", "contrastive"])
def test_decoding_by_each_kernel(name: str, kernel: str, device: Pretence, kernels: None) -> None:
    plain = load(OPTForCausalLM, kernel)
    assert_same(
        *(generate(m, p, DECODING[name]) for m, p in ((moved(plain), moved), (plain, lambda x: x)))
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_hooks(beams: int, device: Pretence) -> None:
    plain = load(OPTForCausalLM)
    names = ["stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn"]
    names += ["streamer"] if beams == 1 else []
    for chosen in (*([name] for name in names), names):
        found, told = [], []
        for model, put in ((moved(plain), moved), (plain, lambda x: x)):
            told.append(Told())
            options = {"num_beams": beams, **hooks(*chosen)(told[-1])}
            found.append(generate(model, put, options))
        assert_same(*found)
        assert told[0].seen == told[1].seen


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "seed": 1}, {"guidance_scale": 1.5}], ids=str
)
def test_an_assistant(options: dict[str, Any], device: Pretence) -> None:
    plain, small = load(OPTForCausalLM), OPTForCausalLM.from_pretrained(case("post_norm").folder)
    small = OPTForCausalLM(plain.config.replace(num_hidden_layers=1)).eval()
    found = generate(moved(plain), moved, {**options, "assistant_model": moved(small)})
    assert_same(found, generate(plain, lambda x: x, {**options, "assistant_model": small}))


def test_prompts_may_lie_on_the_cpu(device: Pretence) -> None:
    there = moved(load(OPTForCausalLM))
    found = there.generate(IDS, attention_mask=MASK, max_new_tokens=NEW)
    assert found.device == DEVICE and found.tolist() == generate(there, moved, {}).tolist()
    assert there.generate(max_new_tokens=2).device == DEVICE


#: For how many values the host waits, for each new token and once: the prompts and their mask, and
#: when all rows have ended; with the options that it is so for.
EVERY = 1 / 16  # search.PATIENCE
WAITS: dict[str, tuple[dict[str, Any], float, int]] = {
    "greedy": ({}, EVERY, 3),
    "sampling": ({"do_sample": True, "seed": 1, "top_k": 20, "top_p": 0.9}, EVERY, 3),
    "layers": ({"dola_layers": [0]}, EVERY, 3),
    "guided": ({"guidance_scale": 1.5}, EVERY, 3),
    "processors": (
        {
            "suppress_tokens": [0, 9, 10],
            "bad_words_ids": [[5], [6, 7]],
            "sequence_bias": {(8,): 2.0},
            "no_repeat_ngram_size": 2,
            "repetition_penalty": 1.3,
            "min_new_tokens": 16,
            "exponential_decay_length_penalty": (2, 1.0),
            "eos_token_id": 0,
        },
        EVERY,
        3,
    ),
    "a processor": ({"logits_processor": [lambda ids, scores: scores.flip(-1)]}, EVERY, 3),
    "beams": ({"num_beams": 3}, 1, 3),
    "sampled beams": ({"num_beams": 3, "do_sample": True, "seed": 1}, 1, 3),
    "groups": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, 1, 3),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 3}, 1, 3),
    "words": ({"force_words_ids": [[5, 6]], "num_beams": 3}, 1, 5),
    "recorded": ({"return_dict_in_generate": True, "output_scores": True}, 1, 2),
    "streamed": ({"streamer": Told()}, 2, 2),
    "a criterion": ({"stopping_criteria": [lambda ids, scores: False]}, 1, 2),
    "prefixes": ({"prefix_allowed_tokens_fn": lambda row, ids: [1, 2, 3, 4]}, 2 + EVERY, 3),
}


def small_model() -> OPTForCausalLM:
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**SMALL).replace(num_hidden_layers=1)).eval().to(DEVICE)


def prompts() -> dict[str, Tensor]:
    return {"input_ids": IDS.to(DEVICE) % 50 + 3, "attention_mask": MASK.to(DEVICE)}


@pytest.mark.parametrize(
    ("name", "cache"),
    [*((name, None) for name in WAITS), ("greedy", "static"), ("contrastive", "static")],
)
def test_waits(name: str, cache: str | None, device: Pretence, recorder: Recorder) -> None:
    """Of 16 and of 32 tokens: the host sends what it has without waiting, and reads no more than this."""
    there, given = small_model(), prompts()
    options, each, once = WAITS[name]
    options = {"eos_token_id": None, **options, "cache_implementation": cache}
    counts = []
    for count in (16, 32):
        device.reads = device.sends = 0
        found = there.generate(**given, max_new_tokens=count, **options)
        found = found if isinstance(found, Tensor) else found.sequences
        assert found.shape[1] == IDS.shape[1] + count
        assert device.sends == 0
        counts.append(device.reads)
    assert counts == [16 * each + once, 32 * each + once]


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_waits_for_proposals(how: str, device: Pretence) -> None:
    """Each row by itself: for its tokens, to look them up; and for each new one, which may end the row."""
    there, given, count = small_model(), prompts(), 16
    options = {"lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {"assistant_model": there}}
    device.reads = device.sends = 0
    found = there.generate(**given, max_new_tokens=count, eos_token_id=None, **options[how])
    assert found.shape[1] == IDS.shape[1] + count and device.sends == 0
    assert device.reads <= 2 * 2 * count + 5
