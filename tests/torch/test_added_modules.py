# SPDX-License-Identifier: Apache-2.0
"""Modules that users add to a model: saved under their own names, loaded by a class that has them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from opt_core import CheckpointError, UnsupportedError
from opt_torch import OPTForCausalLM, OPTModel
from tests.cases import GOLDEN

TIED = GOLDEN / "cases" / "pre_norm"
IDS = torch.tensor([[5, 6, 7]])


class WithValue(OPTForCausalLM):
    """A language model with a head of the user's, a norm with buffers, and a parameter of its own."""

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.value_head = nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 1))
        self.seen = nn.BatchNorm1d(24)

    def value(self, ids):
        hidden = self.model(ids).last_hidden_state.mean(1)
        return self.value_head(self.seen(hidden))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_class_with_layers_of_its_own_is_saved_and_loaded(tmp_path, safe):
    with pytest.warns(UserWarning, match=r"has no value_head\.0\.weight.*initialised anew"):
        model = WithValue.from_pretrained(TIED)
    assert not any(x.is_meta for x in [*model.parameters(), *model.buffers()])
    model.train().value(IDS.repeat(2, 1))  # moves the buffers
    expected = model.eval().value(IDS)
    model.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size="20KB")
    again = WithValue.from_pretrained(tmp_path)
    assert torch.equal(again.value(IDS), expected)
    assert again.seen.num_batches_tracked == 1
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    half = WithValue.from_pretrained(tmp_path, dtype="float16")
    assert half.value_head[0].weight.dtype == half.seen.running_mean.dtype == torch.float16
    assert half.seen.num_batches_tracked.dtype == torch.int64


def test_an_added_module_is_in_the_file(tmp_path):
    """It was left out without a word."""
    model = OPTForCausalLM.from_pretrained(TIED)
    model.value_head = nn.Linear(24, 1)
    model.model.decoder.scale = nn.Parameter(torch.ones(3))
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["value_head.weight"], model.value_head.weight)
    assert "model.decoder.scale" in found and "lm_head.weight" not in found
    with pytest.raises(CheckpointError, match=r"holds 3 tensors.*value_head\.weight"):
        OPTForCausalLM.from_pretrained(tmp_path)
    _, info = OPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert "value_head.bias" in info["unexpected_keys"]


def test_a_bare_model_with_a_head_of_the_users(tmp_path):
    class Scored(OPTModel):
        def __init__(self, config, **kwargs):
            super().__init__(config, **kwargs)
            self.score = nn.Linear(24, 2, bias=False)  # as another class of ours calls its head

    with pytest.warns(UserWarning, match=r"score\.weight"):
        model = Scored.from_pretrained(TIED)
    model.save_pretrained(tmp_path)
    assert torch.equal(Scored.from_pretrained(tmp_path).score.weight, model.score.weight)


def test_an_added_tensor_of_another_shape(tmp_path):
    with pytest.warns(UserWarning, match="initialised anew"):
        model = WithValue.from_pretrained(TIED)
    model.value_head[2] = nn.Linear(8, 2)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"value_head\.2\.weight: expected \(1, 8\).*\(2, 8\)"
    ):
        WithValue.from_pretrained(tmp_path)
    again = WithValue.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert again.value_head[2].weight.shape == (1, 8)
    assert torch.equal(again.value_head[0].weight, model.value_head[0].weight)


def test_a_class_whose_constructor_takes_the_configuration_alone(tmp_path):
    """As most people write one; an argument that nobody gives is not handed on."""

    class Valued(OPTForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.value = nn.Linear(24, 1)

    with pytest.warns(UserWarning, match=r"value\.weight") as told:
        model = Valued.from_pretrained(TIED)
    assert told[0].filename == __file__  # and not a line of ours
    model.save_pretrained(tmp_path)
    assert torch.equal(Valued.from_pretrained(tmp_path).value.weight, model.value.weight)


class Odd(OPTForCausalLM):
    """Values that no `reset_parameters` makes, buffers that are not saved, and shared tensors."""

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.scale = nn.Parameter(torch.full((3,), 2.0))
        self.zeros = nn.Linear(24, 2)
        nn.init.zeros_(self.zeros.weight)
        self.attention = nn.MultiheadAttention(24, 2)
        self.register_buffer("shown", torch.arange(3.0), persistent=False)
        self.twin = nn.Linear(24, 2)
        self.twin.weight = self.zeros.weight
        self.reader = nn.Linear(24, 103, bias=False)
        self.reader.weight = self.get_input_embeddings().weight


def test_what_a_constructor_made_stays(tmp_path):
    """Uninitialised memory stood there, or a module's own initial values."""
    with pytest.warns(UserWarning, match="scale"):
        model = Odd.from_pretrained(TIED)
    for _ in range(2):
        assert torch.equal(model.scale, torch.full((3,), 2.0))
        assert not model.zeros.weight.any() and torch.equal(model.shown, torch.arange(3.0))
        assert model.attention.in_proj_weight.isfinite().all()
        assert model.twin.weight is model.zeros.weight
        assert model.reader.weight is model.get_input_embeddings().weight is model.lm_head.weight
        model.save_pretrained(tmp_path)
        assert "reader.weight" not in load_file(tmp_path / "model.safetensors")
        model = Odd.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["layer", "base", "head"])
def test_compiled_parts_are_saved_once(tmp_path, part):
    """Their tensors have a second name each, by which the file could not be loaded."""
    model = OPTForCausalLM.from_pretrained(TIED)
    expected = model(IDS).logits
    if part == "layer":
        model.model.decoder.layers[0] = torch.compile(
            model.model.decoder.layers[0], backend="eager"
        )
    elif part == "base":
        model.model = torch.compile(model.model, backend="eager")
    else:
        model.lm_head = torch.compile(model.lm_head, backend="eager")
    model.save_pretrained(tmp_path)
    assert torch.equal(OPTForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)


def test_layers_that_were_cut_are_named(tmp_path):
    model = OPTForCausalLM.from_pretrained(TIED)
    model.model.decoder.layers = model.model.decoder.layers[:1]
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn.*num_hidden_layers"):
        model.save_pretrained(tmp_path / "out")
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "out")


def no_head(model):
    model.lm_head = nn.Identity()


def replaced(model):
    model.model.decoder.layers[0].fc1 = nn.Identity()


def bias(model):
    model.lm_head = nn.Linear(24, 103)


def pruned(model):
    prune.l1_unstructured(model.model.decoder.layers[0].fc1, "weight", 0.5)


def normed(model):
    parametrizations.weight_norm(model.model.decoder.layers[1].self_attn.q_proj)


def low_rank(model):
    model.model.decoder.layers[0].fc2.lora_A = nn.Linear(40, 2, bias=False)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (no_head, r"lm_head\.weight"),
        (replaced, r"layers\.0\.fc1\.weight"),
        (bias, r"lm_head\.bias"),
        (pruned, r"layers\.0\.fc1\.weight_(orig|mask)"),
        (normed, r"layers\.1\.self_attn\.q_proj\.parametrizations"),
        (low_rank, r"layers\.0\.fc2\.lora_A\.weight"),
    ],
)
def test_what_changes_a_layer_is_refused_by_name(tmp_path, change, name):
    model = OPTForCausalLM.from_pretrained(TIED)
    change(model)
    with pytest.raises(UnsupportedError, match=rf"{name}.*expected"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
