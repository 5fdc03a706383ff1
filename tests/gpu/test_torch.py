# SPDX-License-Identifier: Apache-2.0
"""PyTorch on a CUDA GPU: FlashAttention-2, CUDA graphs, rounded weights (`make gpu`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opt_core import OPTConfig, UnsupportedError
from opt_torch import OPTForCausalLM
from opt_torch.generation import graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]

#: Of the largest logit of float32, in plain operations.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
LENGTH = 48
KERNELS = ("eager", "sdpa", "flash_attention_2")
HEADS = {"64": (128, 2), "80": (160, 2), "128": (256, 2)}
MASKS = ("none", "left", "right", "amid", "a row of pads")

#: Left to `make gpu-full`: there are others alike.
full = pytest.mark.full

every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
every_head = pytest.mark.parametrize("size", HEADS)
every_mask = pytest.mark.parametrize("where", MASKS)


def config(size: str, **options: Any) -> OPTConfig:
    width, heads = HEADS[size]
    shape = {"hidden_size": width, "num_attention_heads": heads, "ffn_dim": 2 * width}
    return OPTConfig(
        vocab_size=500,
        num_hidden_layers=3,
        max_position_embeddings=400,
        init_std=0.1,
        dropout=0.0,
        **shape,
        **options,
    )


def model(kernel: str, dtype: torch.dtype, size: str = "64", **options: Any) -> OPTForCausalLM:
    """Always with the same weights, those of float32 rounded."""
    torch.manual_seed(0)
    made = OPTForCausalLM(config(size, **options), attn_implementation=kernel)
    return made.to("cuda", dtype).eval()


def tokens(rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, 500, (rows, LENGTH), generator=generator).cuda()


def mask(where: str, rows: int = 4) -> Tensor:
    found = torch.ones((rows, LENGTH), dtype=torch.long)
    if where == "left":
        found[0, :20], found[1, :1] = 0, 0
    elif where == "right":
        found[0, 20:], found[1, -1:] = 0, 0
    elif where == "amid":
        found[0, 3:30:2], found[1, 10:20] = 0, 0
    elif where == "a row of pads":
        found[2] = 0
    return found.cuda()


def labels(seen: Tensor) -> Tensor:
    """Those of real tokens that follow real ones."""
    follows = torch.cat([seen[:, :1] * 0, seen[:, 1:] * seen[:, :-1]], dim=1)
    return tokens(len(seen)).masked_fill(follows == 0, -100)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest number."""
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()


@every_dtype
@every_head
@every_mask
def test_logits_and_gradients(where: str, size: str, dtype: torch.dtype) -> None:
    seen = mask(where)
    exact = model("eager", torch.float32, size)
    output = exact(tokens(), attention_mask=seen, labels=labels(seen))
    output.loss.backward()
    whole = torch.cat([parameter.grad.flatten() for parameter in exact.parameters()]).norm()
    for kernel in KERNELS:
        ours = model(kernel, dtype, size)
        found = ours(tokens(), attention_mask=seen, labels=labels(seen))
        found.loss.backward()
        assert found.logits.isfinite().all()
        assert error(found.logits[seen == 1], output.logits[seen == 1]) < TOLERANCE[dtype], kernel
        for name, parameter in ours.named_parameters():
            expected = exact.get_parameter(name).grad
            assert parameter.grad.isfinite().all(), (kernel, name)
            # That of a key's bias is nothing but rounding: all keys alike change no weight.
            difference = (parameter.grad.float() - expected).norm()
            limit = 4 * TOLERANCE[dtype] * (expected.norm() + whole / 100)
            assert difference < limit, (kernel, name)


@every_dtype
@every_head
@pytest.mark.parametrize("where", ["none", "left", "amid"])
@pytest.mark.parametrize(
    "split",
    [(20, 28), pytest.param((LENGTH - 1, 1), marks=full), pytest.param((1, 40, 7), marks=full)],
    ids=str,
)
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_continued_from_a_cache(
    where: str, size: str, dtype: torch.dtype, split: tuple[int, ...], fixed: bool
) -> None:
    seen = mask(where)
    ours = model("flash_attention_2", dtype, size)
    with torch.no_grad():
        expected = model("eager", torch.float32, size)(tokens(), attention_mask=seen).logits
        cache = ours.init_cache(len(seen), LENGTH + 9) if fixed else None
        parts, length = [], 0
        for ids in tokens().split(split, dim=1):
            length += ids.shape[1]
            output = ours(ids, attention_mask=seen[:, :length], past_key_values=cache)
            cache = output.past_key_values
            parts.append(output.logits)
    found = torch.cat(parts, dim=1)
    assert found.isfinite().all()
    assert error(found[seen == 1], expected[seen == 1]) < TOLERANCE[dtype]


@every_dtype
def test_texts_in_a_row(dtype: torch.dtype) -> None:
    positions = torch.cat([torch.arange(n) for n in (11, 1, 30, 6)])[None].repeat(4, 1).cuda()
    expected = model("eager", torch.float32)(tokens(), position_ids=positions).logits
    found = model("flash_attention_2", dtype)(tokens(), position_ids=positions).logits
    assert error(found, expected) < TOLERANCE[dtype]


@every_dtype
@pytest.mark.parametrize("where", ["none", "left", pytest.param("right", marks=full)])
@pytest.mark.parametrize("static", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("kernel", [pytest.param("eager", marks=full), *KERNELS[1:]])
def test_greedy_tokens(kernel: str, static: bool, where: str, dtype: torch.dtype) -> None:
    """64 of them are those of float32, up to where two logits are nearer than the tolerance."""
    exact, ours = model("eager", torch.float32), model(kernel, dtype)
    options: dict[str, Any] = {"attention_mask": mask(where), "min_new_tokens": 64}
    options["max_new_tokens"] = 64
    if static:
        options["cache_implementation"] = "static"
    found = ours.generate(tokens(), **options)[:, LENGTH:]
    again = ours.generate(tokens(), **options)[:, LENGTH:]
    assert found.tolist() == again.tolist()
    options.pop("cache_implementation", None)
    plain = exact.generate(tokens(), output_scores=True, return_dict_in_generate=True, **options)
    expected = plain.sequences[:, LENGTH:]
    for row in range(len(found)):
        wrong = (found[row] != expected[row]).nonzero()
        if len(wrong):
            scores = plain.scores[int(wrong[0])][row]
            best = scores.topk(2).values
            gap = (best[0] - best[1]) / scores[scores.isfinite()].abs().max()
            assert gap < 2 * TOLERANCE[dtype], (row, int(wrong[0]))


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 50, "top_p": 0.9}], ids=str)
def test_no_step_waits(sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first replay and the last."""
    ours = model("sdpa", torch.float16)
    replay, count = graphs.Recording.__call__, 0

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        torch.cuda.set_sync_debug_mode("error" if count < 12 else "default")
        return replay(*arguments, **options)

    monkeypatch.setattr(graphs.Recording, "__call__", watched)
    options = {"max_new_tokens": 14, "min_new_tokens": 14, "cache_implementation": "static"}
    try:
        ours.generate(tokens(), seed=1 if sampling else None, **sampling, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count == 13


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 3}, {"do_sample": True, "seed": 2}],
    ids=str,
)
def test_graphs_of_other_strategies(options: dict[str, Any]) -> None:
    """In float32, so that no near tie is decided by another kernel."""
    ours = model("eager", torch.float32)
    found, expected = (
        ours.generate(tokens(), max_new_tokens=20, **options, **more).tolist()
        for more in ({"cache_implementation": "static"}, {})
    )
    assert found == expected


def test_one_graph_for_each_bucket() -> None:
    ours = model("sdpa", torch.float16)
    for length in (40, 45, 48):
        ours.generate(tokens()[:, :length], max_new_tokens=8, cache_implementation="static")
    assert len(graphs.recordings_of(ours)) == 1


def test_attention_dropout() -> None:
    """On average what there is without, and never the same twice."""
    ours = model("flash_attention_2", torch.float16, attention_dropout=0.2).train()
    with torch.no_grad():
        draws = torch.stack([ours(tokens()).logits.float() for _ in range(200)])
        expected = ours.eval()(tokens()).logits.float()
    assert draws.std(0).mean() > 0
    assert error(draws.mean(0), expected) < 0.1


@pytest.mark.parametrize(("weights", "limit"), [("int8", 0.03), ("int4", 0.3)])
def test_rounded_weights(weights: str, limit: float) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "num_attention_heads": 16, "ffn_dim": 4096, "vocab_size": 500}
    ours = OPTForCausalLM(OPTConfig(num_hidden_layers=2, **shape)).to("cuda", torch.bfloat16).eval()
    with torch.no_grad():
        expected = ours(tokens()).logits.float()
        ours.prepare_for_decoding(weights=weights)
        assert 0 < error(ours(tokens()).logits, expected) < limit
    plain, static = (
        ours.generate(tokens(), max_new_tokens=8, **options)
        for options in ({}, {"cache_implementation": "static"})
    )
    assert (plain == static).float().mean() > 0.9


def test_float32_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"expected float16 or bfloat16, found torch\.float32"
    ):
        model("flash_attention_2", torch.float32)(tokens())
