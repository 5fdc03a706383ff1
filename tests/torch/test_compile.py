# SPDX-License-Identifier: Apache-2.0
"""What only PyTorch users do: compile, export, read state dicts, load without touching the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from opt_core import OPTConfig
from opt_torch import OPTForCausalLM, OPTModel

GOLDEN = Path(__file__).parent.parent / "golden" / "cases"
CASES = ("pre_norm", "post_norm", "untied_gelu")


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(GOLDEN / request.param)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def inputs(model: OPTForCausalLM) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, model.config.vocab_size, (2, 7), generator=torch.manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [True, False])
def test_one_graph_without_breaks(model, masked, attn_implementation):
    """aot_eager traces as inductor does, and needs no C++ compiler."""
    model.model.decoder.attn_implementation = attn_implementation
    batch = inputs(model)
    if not masked:
        del batch["attention_mask"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, found = model(**batch), compiled(**batch)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found["loss"], expected["loss"])
    found.loss.backward()
    assert model.model.decoder.embed_tokens.weight.grad.abs().sum() > 0


def test_one_graph_with_a_cache(model):
    ids = inputs(model)["input_ids"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(ids).logits
        cache = model.init_cache(2, 16)
        first = compiled(ids[:, :4], past_key_values=cache)
        second = compiled(ids[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), expected)


def test_export_with_a_dynamic_length(model):
    ids = inputs(model)["input_ids"]
    length = torch.export.Dim("length", min=2, max=16)
    program = torch.export.export(
        model,
        (ids,),
        {"use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
    )
    longer = torch.cat([ids, ids], dim=1)
    found = program.module()(longer, use_cache=False)["logits"]
    torch.testing.assert_close(found, model(longer).logits)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_past_of_any_length(strict):
    """What is only a symbol there is compared with nothing but what it must equal anyway."""
    model = OPTForCausalLM.from_pretrained(GOLDEN / "pre_norm")
    ids = torch.arange(3, 17).reshape(2, 7)

    def past(ids: torch.Tensor, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(model(ids[:, :length], use_cache=True).past_key_values)

    batch, columns = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("columns", max=20)
    dims = [({0: batch, 2: columns}, {0: batch, 2: columns})] * 3
    with torch.no_grad():
        program = torch.export.export(
            model,
            (ids[:, 5:],),
            {"past_key_values": past(ids, 5), "use_cache": False},
            dynamic_shapes={
                "input_ids": {0: batch},
                "past_key_values": dims,
                "use_cache": None,
            },
            strict=strict,
        )
        row = torch.arange(3, 20)[None]
        found = program.module()(row[:, 15:], past_key_values=past(row, 15), use_cache=False)
        expected = model(row).logits[:, 15:]
    torch.testing.assert_close(found["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_checks_a_past(dynamic):
    model = OPTForCausalLM.from_pretrained(GOLDEN / "pre_norm")
    ids = torch.arange(3, 17).reshape(2, 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        past = list(model(ids[:, :5], use_cache=True).past_key_values)
        found = compiled(ids[:, 5:], past_key_values=past).logits
        torch.testing.assert_close(found, model(ids).logits[:, 5:], rtol=0, atol=1e-5)
        past[1] = (past[1][0], past[1][1][:, :, 1:])
        with pytest.raises(Exception, match="value of layer 1"):
            compiled(ids[:, 5:], past_key_values=past)


def test_state_dict_has_the_names_of_the_reference():
    model = OPTForCausalLM(OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    names = set(model.state_dict())
    assert "model.decoder.layers.0.self_attn.out_proj.weight" in names
    assert "lm_head.weight" in names
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert "decoder.embed_positions.weight" in set(OPTModel(model.config).state_dict())


def test_weights_are_views_on_the_file_until_written(tmp_path):
    """Loading in the file's own dtype copies nothing, and training never changes the file."""
    OPTForCausalLM.from_pretrained(GOLDEN / "pre_norm").save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = OPTForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    again = OPTForCausalLM.from_pretrained(tmp_path)
    for changed, kept in zip(model.parameters(), again.parameters(), strict=True):
        np.testing.assert_array_equal(changed.detach().numpy(), kept.detach().numpy() + 1.0)


def test_meta_device_makes_no_weights():
    with torch.device("meta"):
        model = OPTForCausalLM(OPTConfig.preset("opt-175b"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 174_604_468_224
