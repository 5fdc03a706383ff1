# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-2 without a GPU: kernels of the vendors' signatures, written here in plain operations.

What these tests cannot tell is whether the real kernels do the same: tests/flash and tests/gpu ask them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from opt_core import OPTConfig, UnsupportedError
from opt_torch import OPTForCausalLM, attention, flash
from tests.cases import case
from tests.flash_cases import (
    FLASH,
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


def one_text(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """q [T, N, H], k, v [S, N, H] -> [T, N, H]: each query sees what ends with its own key."""
    scores = torch.einsum("tnh,snh->nts", q, k) * scale
    if causal:
        keys = torch.arange(len(k), device=k.device)
        scores = scores.masked_fill(keys > keys[len(k) - len(q) :, None], -torch.inf)
    return torch.einsum("nts,snh->tnh", scores.softmax(-1), v)


class Vendor:
    """Functions as flash_attn has them, and what they were called with."""

    def __init__(self) -> None:
        self.dropouts: list[float] = []
        self.dense_shapes: list[tuple[int, ...]] = []
        self.packed_shapes: list[tuple[int, ...]] = []

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p=0.0, softmax_scale=None, causal=False
    ) -> Tensor:
        self.dropouts.append(dropout_p)
        self.dense_shapes.append((*q.shape[:2], k.shape[1]))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        rows = [one_text(*row, scale, causal) for row in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
    ) -> Tensor:
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        self.dropouts.append(dropout_p)
        self.packed_shapes.append((len(q), len(k)))
        counts_q, counts_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (max(counts_q), max(counts_k)) == (max_seqlen_q, max_seqlen_k)
        assert (sum(counts_q), sum(counts_k)) == (len(q), len(k))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        parts = (q.split(counts_q), k.split(counts_k), v.split(counts_k))
        found = [one_text(*text, scale, causal) for text in zip(*parts, strict=True)]
        return torch.cat(found)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the kernels be called on this machine, in float32; what was found of them is forgotten."""
    monkeypatch.setattr(flash, "DEVICES", ("cpu",))
    monkeypatch.setattr(flash, "DTYPES", (torch.float32, torch.float64))
    monkeypatch.setattr("opt_core.calls._told", set())
    flash._FOUND.clear()
    yield
    flash._FOUND.clear()


@pytest.fixture
def vendor(here: None, monkeypatch: pytest.MonkeyPatch) -> Vendor:
    """The package, installed."""
    found, package = Vendor(), ModuleType("flash_attn")
    package.__version__ = "2.7.4.post1"
    package.flash_attn_func = found.flash_attn_func
    package.flash_attn_varlen_func = found.flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return found


def newest(vendor: Vendor) -> Callable[..., Tensor]:
    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert window_size in ((-1, 0), (-1, -1))
        causal = window_size == (-1, 0)
        ends = (cu_seq_q, cu_seq_k, max_q, max_k)
        return vendor.flash_attn_varlen_func(q, k, v, *ends, 0.0, scale, causal)

    return varlen_attn


def oldest(vendor: Vendor) -> Callable[..., Tensor]:
    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        ends = (cu_seq_q, cu_seq_k, max_q, max_k)
        return vendor.flash_attn_varlen_func(q, k, v, *ends, 0.0, None, is_causal)

    return varlen_attn


@pytest.fixture(params=["package", "newest PyTorch", "PyTorch 2.10"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Vendor:
    """Each place that the kernels may come from."""
    if request.param == "package":
        return request.getfixturevalue("vendor")
    request.getfixturevalue("here")
    found = Vendor()
    make = newest if request.param == "newest PyTorch" else oldest
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(torch_varlen, "varlen_attn", make(found))
    return found


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("name", ["pre_norm", "post_norm"])
def test_padding(kernels: Vendor, name: str, where: str) -> None:
    """Real tokens as in plain operations, and finite numbers at pads."""
    ours, plain = pair(name)
    mask = torch.tensor(MASKS[where])
    found, expected = (m(tokens(len(mask)), attention_mask=mask) for m in (ours, plain))
    real = mask == 1
    torch.testing.assert_close(found.logits[real], expected.logits[real])
    assert found.logits.isfinite().all()
    count = int(mask.sum())
    if where != "none":
        assert kernels.packed_shapes == [(count, count)] * ours.config.num_hidden_layers


@pytest.mark.parametrize("where", MASKS)
def test_gradients(kernels: Vendor, where: str) -> None:
    ours, plain = pair(dtype="float64")
    mask = torch.tensor(MASKS[where])
    for each in (ours, plain):
        each(tokens(len(mask)), attention_mask=mask, labels=labels(mask)).loss.backward()
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("head", ["OPTForCausalLM", "OPTForQuestionAnswering"])
def test_losses_differ_at_pads_alone(kernels: Vendor, head: str) -> None:
    """What a pad predicts is another number than in plain operations: docs/training.md excludes it."""
    ours, plain = random_pair(8, head)
    as_given, excluded = losses_with_pads(ours, plain)
    assert abs(as_given[0] - as_given[1]) > 1e-2
    near(excluded[0], excluded[1], head)
    for loss in excluded:
        loss.backward()
    same_gradients(ours, plain)


def test_texts_in_a_row(kernels: Vendor) -> None:
    """Of five texts with pads between them each sees itself alone."""
    ours, plain = pair()
    positions = torch.tensor(POSITIONS)
    mask = (positions >= 0).long()
    found, expected = (
        m(tokens(2), attention_mask=mask, position_ids=positions).logits for m in (ours, plain)
    )
    torch.testing.assert_close(found[mask == 1], expected[mask == 1])
    assert kernels.packed_shapes[0] == (12, 12)
    whole = {"position_ids": torch.arange(LENGTH)[None]}
    kernels.packed_shapes.clear()
    torch.testing.assert_close(ours(tokens(2), **whole).logits, plain(tokens(2), **whole).logits)
    assert not kernels.packed_shapes


@pytest.mark.parametrize("where", ["left", "amid", "none"])
@pytest.mark.parametrize("split", [[3, 4], [4, 1, 2], [6, 1]])
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_continued_from_a_cache(vendor: Vendor, where: str, split: list[int], fixed: bool) -> None:
    ours, plain = pair()
    mask = torch.tensor(MASKS[where])
    expected = plain(tokens(len(mask)), attention_mask=mask).logits
    cache = ours.init_cache(len(mask), LENGTH + 3) if fixed else None
    parts, seen = [], 0
    for ids in tokens(len(mask)).split(split, dim=1):
        seen += ids.shape[1]
        output = ours(ids, attention_mask=mask[:, :seen], past_key_values=cache)
        cache = output.past_key_values
        parts.append(output.logits)
    real = mask == 1
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], expected[real])


def test_the_dense_kernel_reads_the_cache_in_place(vendor: Vendor) -> None:
    """One query and the columns in use, not the buffer's."""
    ours, _ = pair()
    cache = ours(tokens(2), past_key_values=ours.init_cache(2, 20)).past_key_values
    ours(tokens(2)[:, :1], past_key_values=cache)
    assert set(vendor.dense_shapes) == {(2, LENGTH, LENGTH), (2, 1, LENGTH + 1)}
    assert not vendor.packed_shapes


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("where", ["left", "right"])
def test_generated_tokens(kernels: Vendor, strategy: str, where: str) -> None:
    ours, plain = pair()
    assert generated(ours, strategy, where) == generated(plain, strategy, where)


def test_dropout_of_packed_tokens(vendor: Vendor) -> None:
    """The package has it, and gets its rate in training alone."""
    ours, _ = pair(attention_dropout=0.25)
    mask = torch.tensor(MASKS["left"])
    ours.train()(tokens(2), attention_mask=mask)
    ours.train()(tokens(2))
    ours.eval()(tokens(2), attention_mask=mask)
    layers = ours.config.num_hidden_layers
    assert vendor.dropouts == [0.25] * 2 * layers + [0.0] * layers


def test_dropout_that_pytorch_does_not_have(kernels: Vendor, request: Any) -> None:
    if "package" in request.node.name:
        pytest.skip("which has it")
    ours, plain = pair(attention_dropout=0.25, dropout=0.0)
    mask = torch.tensor(MASKS["left"])
    with pytest.warns(UserWarning, match="such calls run 'sdpa' instead"):
        losses = [ours.train()(tokens(2), attention_mask=mask, labels=tokens(2)).loss]
    losses += [ours(tokens(2), attention_mask=mask, labels=tokens(2)).loss for _ in range(3)]
    assert not kernels.dropouts and len({loss.item() for loss in losses}) == 4
    found, expected = (m.eval()(tokens(2), attention_mask=mask).logits for m in (ours, plain))
    torch.testing.assert_close(found[mask == 1], expected[mask == 1])
    assert kernels.dropouts


def test_calls_that_need_the_weights_run_in_plain_operations(vendor: Vendor) -> None:
    ours, plain = pair()
    with pytest.warns(UserWarning, match="run 'eager' instead"):
        found = ours(tokens(2), output_attentions=True)
    factors = torch.rand(ours.config.num_hidden_layers, ours.config.num_attention_heads)
    masked = ours(tokens(2), head_mask=factors)  # a second warning would be an error
    assert not vendor.dense_shapes
    expected = plain(tokens(2), output_attentions=True)
    for mine, other in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(masked.logits, plain(tokens(2), head_mask=factors).logits)
    ours(tokens(2))
    assert vendor.dense_shapes


def test_gradient_checkpointing(vendor: Vendor) -> None:
    ours, plain = pair(dtype="float64", dropout=0.0)
    ours.gradient_checkpointing_enable()
    mask = torch.tensor(MASKS["left"])
    for each in (ours, plain):
        each.train()(tokens(2), attention_mask=mask, labels=labels(mask)).loss.backward()
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_on_a_cpu() -> None:
    with pytest.raises(
        UnsupportedError, match=r"expected a CUDA device, found cpu\. Call model\.to"
    ):
        pair()[0](tokens(2))


def test_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast its products have 16 bits: that is well."""
    monkeypatch.setattr(flash, "DEVICES", ("cpu",))
    ours, plain = pair()
    message = r"expected float16 or bfloat16, found torch\.float32\. Load the model with dtype"
    with pytest.raises(UnsupportedError, match=message):
        ours(tokens(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(tokens(2)).logits
    torch.testing.assert_close(found.float(), plain(tokens(2)).logits, rtol=0.1, atol=0.1)


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))

    class Query:
        device, dtype = torch.device("cuda", 0), torch.float16

    with pytest.raises(
        UnsupportedError, match=r"capability 8\.0 or more \(Ampere\), found an older"
    ):
        flash._check(Query())


@pytest.mark.parametrize("version", ["2.0.9", "1.0"])
def test_a_package_that_is_too_old(vendor: Vendor, version: str) -> None:
    sys.modules["flash_attn"].__version__ = version
    assert not flash.kernels().drops


def test_a_package_that_does_not_load(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "flash_attn":
                raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.warns(UserWarning, match="cannot be imported .undefined symbol"):
        assert not flash.kernels().drops


@pytest.mark.parametrize("size", ["opt-125m", "opt-350m", "opt-2.7b", "opt-13b"])
def test_shapes_of_real_sizes(size: str) -> None:
    """Head sizes of 64, 80 and 128, in PyTorch's own kernel."""
    flash._FOUND.clear()
    config = OPTConfig.preset(size, num_hidden_layers=2)
    with torch.device("meta"):
        large = OPTForCausalLM(config, attn_implementation=FLASH).half().eval()
        output = large(torch.zeros((2, 2048), dtype=torch.long))
        logits = large(
            torch.zeros((2, 1), dtype=torch.long),
            past_key_values=tuple(tuple(x[:, :, :-1] for x in p) for p in output.past_key_values),
        ).logits
    assert output.logits.shape == (2, 2048, config.vocab_size)
    assert logits.shape == (2, 1, config.vocab_size) and logits.dtype == torch.float16


def test_a_mask_without_zeros_reaches_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then PyTorch's fused attention may take its own flash kernel."""
    biases = []

    def spy(query: Tensor, key: Tensor, value: Tensor, bias: Any, *others: Any) -> Any:
        biases.append(bias)
        return attention.sdpa_attention(query, key, value, bias, *others)

    kernel = replace(attention.KERNELS["sdpa"], function=spy)
    monkeypatch.setitem(attention.KERNELS, "sdpa", kernel)
    whole = OPTForCausalLM.from_pretrained(case("pre_norm").folder)
    mask = torch.ones((2, LENGTH), dtype=torch.long)
    torch.testing.assert_close(
        whole(tokens(2), attention_mask=mask).logits, whole(tokens(2)).logits, rtol=0, atol=0
    )
    assert biases and all(bias is None for bias in biases)
    whole(tokens(2), attention_mask=torch.tensor(MASKS["left"]))
    assert biases[-1] is not None


def test_a_layer_keeps_only_what_is_asked_for() -> None:
    """When it ends, no keys, values, weights or hidden states live on but those of the one before."""
    config = OPTConfig.preset("opt-125m", num_hidden_layers=6, vocab_size=90)
    ours = OPTForCausalLM(config, attn_implementation="eager").eval()
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    def note(layer: Any, inputs: Any, outputs: Any) -> None:
        hidden_states, weights, cache = outputs
        counts.append(sum(found() is not None for found in alive))
        alive.extend(weakref.ref(x) for x in (hidden_states, weights, cache.key, cache.value))

    for layer in ours.model.decoder.layers:
        layer.register_forward_hook(note)
    with torch.no_grad():
        ours(tokens(2), use_cache=False)
    assert len(counts) == 6 and max(counts) <= 4


@pytest.mark.parametrize("package", [True, False], ids=["package", "PyTorch"])
def test_in_a_compiled_program(package: bool, request: pytest.FixtureRequest) -> None:
    """Whole where no row has pads; where one has, it breaks at the question where they are."""
    request.getfixturevalue("vendor" if package else "here")
    torch.compiler.reset()
    ours, plain = pair()
    found = torch.compile(ours, fullgraph=True, backend="aot_eager")(tokens(2)).logits
    torch.testing.assert_close(found, plain(tokens(2)).logits)
    if package:
        mask = torch.tensor(MASKS["left"])
        with torch.no_grad():
            found = torch.compile(ours, backend="aot_eager")(tokens(2), attention_mask=mask).logits
        expected = plain(tokens(2), attention_mask=mask).logits
        torch.testing.assert_close(found[mask == 1], expected[mask == 1])
