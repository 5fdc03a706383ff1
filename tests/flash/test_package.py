# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-2 as the flash_attn package computes it, against plain operations, in float32.

Everything that a model does with it: logits, gradients, heads, caches, packed texts, each way to decode.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import opt_torch
from opt_torch import OPTForCausalLM
from tests.cases import CASES, case
from tests.flash_cases import (
    LENGTH,
    MASKS,
    POSITIONS,
    STRATEGIES,
    generated,
    labels,
    losses_with_pads,
    near,
    pair,
    random_pair,
    same_gradients,
    tokens,
)

pytestmark = [
    pytest.mark.flash,
    pytest.mark.filterwarnings("ignore:Conversion of an array"),  # numpy to Triton's interpreter
]
#: Sizes of heads: those of the published models, and some that fill no block of the kernel.
HEADS = (4, 20, 64, 80, 96, 128, 256)
SHAPES: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    "galactica": {"enable_bias": False, "layer_norm_elementwise_affine": False},
    "untied": {"tie_word_embeddings": False, "_remove_final_layer_norm": True},
}
#: Longer than a block of the kernel, 150 columns: pads before, amid and after the tokens.
LONG = torch.stack(
    [
        torch.arange(150) >= 70,
        (torch.arange(150) < 20) | (torch.arange(150) >= 90),
        torch.arange(150) < 131,
    ]
).long()


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("name", CASES)
def test_logits(calls: Counter[str], name: str, where: str) -> None:
    ours, plain = pair(name)
    mask = torch.tensor(MASKS[where])
    found, expected = (
        model(tokens(len(mask), ours.config.vocab_size), attention_mask=mask).logits
        for model in (ours, plain)
    )
    near(found[mask == 1], expected[mask == 1], where)
    assert found.isfinite().all()
    kernel = "fwd" if where == "none" else "varlen_fwd"
    assert calls == {kernel: ours.config.num_hidden_layers}


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("name", ["pre_norm", "post_norm", "no_bias", "no_affine", "untied_gelu"])
def test_gradients(calls: Counter[str], name: str, where: str) -> None:
    ours, plain = pair(name)
    mask = torch.tensor(MASKS[where])
    for model in (ours, plain):
        model(tokens(len(mask), 60), attention_mask=mask, labels=labels(mask, 60)).loss.backward()
    same_gradients(ours, plain)
    layers = ours.config.num_hidden_layers
    packs = "" if where == "none" else "varlen_"
    assert calls == {f"{packs}fwd": layers, f"{packs}bwd": layers}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", HEADS)
def test_sizes_of_heads(calls: Counter[str], heads: int, shape: str) -> None:
    """Logits and gradients, of padded rows and of whole ones."""
    ours, plain = random_pair(heads, **SHAPES[shape])
    for where in ("left", "none"):
        mask = torch.tensor(MASKS[where])
        outputs = []
        for model in (ours, plain):
            model.zero_grad()
            outputs.append(model(tokens(2), attention_mask=mask, labels=labels(mask)))
            outputs[-1].loss.backward()
        near(outputs[0].logits[mask == 1], outputs[1].logits[mask == 1], where)
        same_gradients(ours, plain)
    assert calls == dict.fromkeys(("fwd", "bwd", "varlen_fwd", "varlen_bwd"), 2)


@pytest.mark.parametrize("heads", [64, 80, 128])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
def test_rows_longer_than_a_block(calls: Counter[str], heads: int, padded: bool) -> None:
    ours, plain = random_pair(heads, num_heads=1)
    mask = LONG if padded else torch.ones_like(LONG)
    ids, outputs = tokens(len(mask), length=mask.shape[1]), []
    for model in (ours, plain):
        outputs.append(model(ids, attention_mask=mask, labels=labels(mask)))
        outputs[-1].loss.backward()
    near(outputs[0].logits[mask == 1], outputs[1].logits[mask == 1], "logits")
    same_gradients(ours, plain)
    assert calls["varlen_bwd" if padded else "bwd"] == 2


@pytest.mark.parametrize("name", ["pre_norm", "post_norm"])
def test_texts_in_a_row(calls: Counter[str], name: str) -> None:
    """Of five texts each sees itself alone, with pads between them and without."""
    ours, plain = pair(name)
    padded = torch.tensor(POSITIONS)
    for positions in (padded, torch.tensor([[0, 1, 2, 0, 1, 0, 1]]).expand(2, -1)):
        mask, outputs = (positions >= 0).long(), []
        for model in (ours, plain):
            model.zero_grad()
            given = {"attention_mask": mask} if positions is padded else {}
            wanted = tokens(2).masked_fill(positions < 1, -100)
            outputs.append(model(tokens(2), position_ids=positions, labels=wanted, **given))
            outputs[-1].loss.backward()
        near(outputs[0].logits[mask == 1], outputs[1].logits[mask == 1], "logits")
        near(outputs[0].loss, outputs[1].loss, "loss")
        same_gradients(ours, plain)
    layers = ours.config.num_hidden_layers
    assert calls == dict.fromkeys(("varlen_fwd", "varlen_bwd"), 2 * layers)


@pytest.mark.parametrize("where", ["left", "right", "amid", "none"])
@pytest.mark.parametrize("split", [[3, 4], [4, 1, 2], [1] * LENGTH], ids=str)
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_continued_from_a_cache(
    calls: Counter[str], where: str, split: list[int], fixed: bool
) -> None:
    ours, plain = pair("post_norm")
    mask = torch.tensor(MASKS[where])
    expected = plain(tokens(len(mask)), attention_mask=mask).logits
    cache = ours.init_cache(len(mask), LENGTH + 3) if fixed else None
    parts, seen = [], 0
    with torch.no_grad():
        for ids in tokens(len(mask)).split(split, dim=1):
            seen += ids.shape[1]
            output = ours(ids, attention_mask=mask[:, :seen], past_key_values=cache)
            cache = output.past_key_values
            parts.append(output.logits)
    found = torch.cat(parts, dim=1)
    near(found[mask == 1], expected[mask == 1], where)
    assert calls.total() == ours.config.num_hidden_layers * len(split)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("name", "where"), [("pre_norm", "left"), ("post_norm", "right")])
def test_generated_tokens(calls: Counter[str], name: str, where: str, strategy: str) -> None:
    if "assistant_model" in STRATEGIES[strategy]:
        name = "pre_norm"  # of the assistant's vocabulary
    ours, plain = pair(name)
    expected = generated(plain, strategy, where)
    assert not calls
    assert generated(ours, strategy, where) == expected
    steps = 1 if strategy == "static cache" else 2  # whose steps a graph computes, without it
    assert calls.total() >= steps * ours.config.num_hidden_layers
    assert calls["varlen_fwd"]


@pytest.mark.parametrize("where", ["left", "none"])
def test_generated_from_a_past(calls: Counter[str], where: str) -> None:
    ours, plain = pair()
    mask, found = torch.tensor(MASKS[where]), []
    for model in (ours, plain):
        past = model(tokens(2)[:, :4], attention_mask=mask[:, :4]).past_key_values
        options = {"past_key_values": past, "max_new_tokens": 3, "eos_token_id": None}
        found.append(model.generate(tokens(2), attention_mask=mask, **options).tolist())
    assert found[0] == found[1]
    assert calls.total() == 4 * ours.config.num_hidden_layers


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("shape", ["pre-norm", "opt-350m"])
def test_classification(calls: Counter[str], shape: str, where: str) -> None:
    """It reads the last real token of each row alone."""
    ours, plain = random_pair(20, "OPTForSequenceClassification", **SHAPES[shape])
    mask = torch.tensor(MASKS[where])
    chosen = mask.any(dim=1)  # a row of pads has no class
    ids = tokens(len(mask)).masked_fill(mask == 0, ours.config.pad_token_id)
    classes, outputs = torch.tensor([2, 0, 1])[: len(mask)].masked_fill(~chosen, -100), []
    for model in (ours, plain):
        outputs.append(model(ids, attention_mask=mask, labels=classes))
        outputs[-1].loss.backward()
    near(outputs[0].logits[chosen], outputs[1].logits[chosen], "logits")
    near(outputs[0].loss, outputs[1].loss, "loss")
    same_gradients(ours, plain)
    assert calls.total() == 2 * ours.config.num_hidden_layers


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("shape", ["pre-norm", "opt-350m"])
def test_questions(calls: Counter[str], shape: str, where: str) -> None:
    ours, plain = random_pair(20, "OPTForQuestionAnswering", **SHAPES[shape])
    mask = torch.tensor(MASKS[where])
    found, expected = (model(tokens(len(mask)), attention_mask=mask) for model in (ours, plain))
    for name in ("start_logits", "end_logits"):
        near(found[name][mask == 1], expected[name][mask == 1], name)
    assert calls.total() == ours.config.num_hidden_layers


def test_without_pads_losses_of_answers_are_the_same(calls: Counter[str]) -> None:
    ours, plain = random_pair(20, "OPTForQuestionAnswering")
    spans = {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 6])}
    losses = [model(tokens(2), **spans).loss for model in (ours, plain)]
    for loss in losses:
        loss.backward()
    near(losses[0], losses[1], "loss")
    same_gradients(ours, plain)
    assert calls["bwd"] == ours.config.num_hidden_layers


def test_gradient_checkpointing(calls: Counter[str]) -> None:
    ours, plain = pair(dropout=0.0)
    ours.gradient_checkpointing_enable()
    mask = torch.tensor(MASKS["left"])
    for model in (ours, plain):
        model.train()(tokens(2), attention_mask=mask, labels=labels(mask)).loss.backward()
    same_gradients(ours, plain)
    layers = ours.config.num_hidden_layers
    assert calls == {"varlen_fwd": 2 * layers, "varlen_bwd": layers}


@pytest.mark.parametrize("head", ["OPTForCausalLM", "OPTForQuestionAnswering"])
def test_losses_differ_at_pads_alone(calls: Counter[str], head: str) -> None:
    ours, plain = random_pair(20, head)
    as_given, excluded = losses_with_pads(ours, plain)
    assert abs(as_given[0] - as_given[1]) > 1e-2
    near(excluded[0], excluded[1], head)
    for loss in excluded:
        loss.backward()
    same_gradients(ours, plain)
    assert calls["varlen_bwd"]


def test_half_precision(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel is made for; its products are rounded as those of plain operations are."""
    monkeypatch.setattr(opt_torch.flash, "DTYPES", (torch.float16,))
    ours, plain = pair(dtype="float16")
    exact = OPTForCausalLM.from_pretrained(case("pre_norm").folder, attn_implementation="eager")
    mask = torch.tensor(MASKS["left"])
    found, other, expected = (
        model(tokens(2), attention_mask=mask).logits[mask == 1].detach().float()
        for model in (ours, plain, exact)
    )
    errors = [float((x - expected).abs().max()) for x in (found, other)]
    assert errors[0] < 2 * errors[1]
    assert calls["varlen_fwd"]
