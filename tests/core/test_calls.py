# SPDX-License-Identifier: Apache-2.0
"""The plan for a call: which kernel, which bias, what is kept, without any framework."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest

from opt_core import OPTConfig, calls
from opt_core.calls import Asked, BiasKind, CallPlan, Facts, Kernel, plan_call

KERNELS = {
    "eager": Kernel(max, shows_weights=True, masks_heads=True, drops=True),
    "sdpa": Kernel(min, drops=True, is_causal=True),
    "plain": Kernel(abs, is_causal=True),  # a fused kernel without dropout
    "flash": Kernel(sum, drops=True, packs=True, can_pack=lambda dropout: dropout == 0),
}
PROMPT, STEP = Facts(7), Facts(1, has_past=True)
TRACED = Facts(1, has_past=True, has_room=True)


def plan(name: str = "sdpa", facts: Facts = PROMPT, config: Any = None, **asked: Any) -> CallPlan:
    return plan_call(config or OPTConfig(), KERNELS, name, Asked(**asked), facts)


def chosen(plan: CallPlan) -> str:
    return next(name for name, kernel in KERNELS.items() if kernel is plan.kernel)


@pytest.mark.parametrize(
    ("name", "facts", "bias"),
    [
        ("sdpa", PROMPT, "causal"),
        ("sdpa", replace(PROMPT, hides=True), "full"),
        ("sdpa", replace(PROMPT, has_texts=True), "full"),
        ("sdpa", Facts(7, has_past=True), "full"),  # a causal flag would count from the upper left
        ("sdpa", Facts(None), "causal"),
        ("sdpa", Facts(None, has_past=True), "full"),
        ("sdpa", STEP, "none"),
        ("sdpa", replace(STEP, hides=True), "full"),
        ("sdpa", TRACED, "full"),  # columns that are not in use
        ("eager", PROMPT, "full"),
        ("eager", STEP, "none"),
        ("flash", PROMPT, "packed"),
        ("flash", STEP, "packed"),
        ("flash", replace(PROMPT, hides=True), "packed"),
        ("flash", TRACED, "full"),  # runs sdpa
    ],
)
def test_the_bias(name: str, facts: Facts, bias: str) -> None:
    found = plan(name, facts)
    assert found.bias is BiasKind(bias)
    assert found.is_causal == (bias == "causal" or (bias == "packed" and facts.length != 1))


@pytest.mark.parametrize(
    ("name", "facts", "asked", "used"),
    [
        ("sdpa", PROMPT, {}, "sdpa"),
        ("sdpa", PROMPT, {"output_attentions": True}, "eager"),
        ("sdpa", replace(PROMPT, masks_heads=True), {}, "eager"),
        ("sdpa", replace(PROMPT, trains=True), {}, "sdpa"),
        ("plain", replace(PROMPT, trains=True), {}, "eager"),
        ("plain", PROMPT, {}, "plain"),
        ("flash", replace(PROMPT, trains=True), {}, "flash"),
        ("flash", replace(PROMPT, trains=True, hides=True), {}, "sdpa"),
        ("flash", replace(PROMPT, trains=True, has_texts=True), {}, "sdpa"),
        ("flash", replace(PROMPT, hides=True), {}, "flash"),
        ("flash", TRACED, {}, "sdpa"),
        ("flash", PROMPT, {"output_attentions": True}, "eager"),
        ("eager", PROMPT, {"output_attentions": True}, "eager"),
    ],
)
def test_the_kernel(name: str, facts: Facts, asked: dict[str, Any], used: str) -> None:
    found = plan(name, facts, OPTConfig(attention_dropout=0.1), **asked)
    assert chosen(found) == used
    assert bool(found.remarks) == (used != name and facts != TRACED)


def test_what_is_asked_for_beats_the_configuration() -> None:
    names = ("use_cache", "output_attentions", "output_hidden_states", "return_dict")
    for value in (True, False):
        config = OPTConfig(**dict.fromkeys(names, value))
        found = plan("eager", config=config)
        assert [getattr(found, name) for name in names] == [value] * 4
        found = plan("eager", config=config, **dict.fromkeys(names, not value))
        assert [getattr(found, name) for name in names] == [not value] * 4


def test_a_backend_may_have_a_default_of_its_own() -> None:
    for value in (True, False):
        facts = replace(PROMPT, keeps_cache=value)
        assert plan(facts=facts).use_cache is value
        assert plan(facts=facts, use_cache=not value).use_cache is not value
    assert not plan(facts=replace(PROMPT, keeps_cache=True, recomputes=True)).remarks


def test_no_cache_is_kept_where_layers_are_computed_again() -> None:
    facts = replace(PROMPT, recomputes=True)
    assert not plan(facts=facts).use_cache and not plan(facts=facts).remarks
    found = plan(facts=facts, use_cache=True)
    assert not found.use_cache and "use_cache=True has no effect" in found.remarks[0][1]


def test_remarks_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_told", set())
    found = plan(output_attentions=True)
    with pytest.warns(
        UserWarning, match="'sdpa' neither shows attention weights nor masks heads: such"
    ):
        calls.tell_once(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls.tell_once(found)
    with pytest.warns(UserWarning, match="nor masks heads nor has dropout"):
        calls.tell_once(plan("plain", replace(PROMPT, masks_heads=True)))


def test_a_plan_can_be_hashed() -> None:
    assert hash(plan()) == hash(plan()) and plan() == plan()
