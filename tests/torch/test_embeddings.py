# SPDX-License-Identifier: Apache-2.0
"""Embeddings and heads that are exchanged or resized, where PyTorch has its own ways to break them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opt_core import InputError
from opt_torch import OPTForCausalLM, OPTForSequenceClassification
from tests.cases import GOLDEN

TIED, UNTIED = (GOLDEN / "cases" / name for name in ("pre_norm", "untied_gelu"))
IDS = torch.tensor([[5, 6, 7]])


def test_a_tied_head_follows_its_embeddings():
    model = OPTForCausalLM.from_pretrained(TIED)
    table = nn.Embedding(*model.get_input_embeddings().weight.shape)
    model.set_input_embeddings(table)
    assert model.get_output_embeddings().weight is table.weight
    expected = model.model(IDS).last_hidden_state @ table.weight.T
    torch.testing.assert_close(model(IDS).logits, expected)
    with pytest.raises(InputError, match="tie_word_embeddings to False"):
        model.set_output_embeddings(nn.Linear(24, 103, bias=False))


def test_a_head_can_be_untied(tmp_path):
    model = OPTForCausalLM.from_pretrained(TIED)
    model.config.tie_word_embeddings = False
    head = nn.Linear(24, 103, bias=False)
    model.set_output_embeddings(head)
    expected = model(IDS).logits
    torch.testing.assert_close(expected, head(model.model(IDS).last_hidden_state))
    model.save_pretrained(tmp_path)
    again = OPTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, expected)


def test_other_heads_have_no_output_embeddings():
    with pytest.warns(UserWarning, match="score"):
        model = OPTForSequenceClassification.from_pretrained(TIED)
    assert model.get_output_embeddings() is None
    with pytest.raises(InputError, match="has no language modelling head"):
        model.set_output_embeddings(nn.Linear(24, 103))


@pytest.mark.parametrize("folder", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_resized_model_learns_its_new_rows(folder):
    model = OPTForCausalLM.from_pretrained(folder, dtype="float32").train()
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 3)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.get_output_embeddings().weight[size + 2].detach().clone()
    ids = torch.tensor([[5, size + 2, 7]])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(model.get_output_embeddings().weight[size + 2], before)


def test_weights_packed_for_decoding_are_resized_as_plain_ones():
    expected, model = (OPTForCausalLM.from_pretrained(UNTIED) for _ in range(2))
    model.prepare_for_decoding(batch_size=8)
    for each in (expected, model):
        torch.manual_seed(0)
        each.resize_token_embeddings(pad_to_multiple_of=64)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)
    assert model(IDS).logits.shape[-1] == 128


def test_frozen_rows_stay_frozen_and_keep_their_kind():
    model = OPTForCausalLM.from_pretrained(UNTIED, dtype="bfloat16")
    model.get_input_embeddings().weight.requires_grad_(False)
    table = model.resize_token_embeddings(50)
    assert (table.weight.dtype, table.weight.requires_grad) == (torch.bfloat16, False)
    assert table.num_embeddings == 50 and model.get_output_embeddings().out_features == 50


def kept(model: OPTForCausalLM) -> int:
    """How many numbers a call keeps for its gradients, parameters left out."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    count = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 0 if tensor.data_ptr() in own else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.ones((4, 30), dtype=torch.long), labels=torch.ones((4, 30), dtype=torch.long))
    return count


def test_checkpointed_layers_keep_their_inputs_alone():
    model = OPTForCausalLM.from_pretrained(TIED).train()
    plain = kept(model)
    model.gradient_checkpointing_enable()
    layer_inputs = 3 * 4 * 30 * 24
    head = 4 * 30 * 103 * 3
    assert kept(model) < layer_inputs + head + 4 * 30 * 24 * 4 < plain


def test_generation_in_training_mode_has_a_cache():
    model = OPTForCausalLM.from_pretrained(TIED)
    model.config.dropout = 0.0
    expected = model.generate(IDS, max_new_tokens=4)
    for layer in model.model.decoder.layers:
        layer.dropout = 0.0
    model.train()
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(IDS, max_new_tokens=4), expected)


def untie_by_assignment(model):
    model.lm_head = nn.Linear(24, 103, bias=False)


def untie_the_weight(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() + 1)


def untie_the_embedding(model):
    table = model.get_input_embeddings()
    table.weight = nn.Parameter(table.weight.detach().clone() + 1)


def untie_equal_values(model):
    """Equal today, another matrix after the next step of a training."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    "untie", [untie_by_assignment, untie_the_weight, untie_the_embedding, untie_equal_values]
)
def test_a_head_untied_by_hand_is_saved(tmp_path, untie, safe):
    """No head was written, and the next loading took the embedding for it."""
    model = OPTForCausalLM.from_pretrained(TIED)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    untie(model)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    expected = model(IDS).logits
    model.save_pretrained(tmp_path, safe_serialization=safe)
    again = OPTForCausalLM.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings is False and torch.equal(again(IDS).logits, expected)
    assert again.lm_head.weight is not again.get_input_embeddings().weight


def test_a_head_untied_by_hand_stays_so():
    """Resizing the model, and other embeddings, made it the embedding again."""
    model = OPTForCausalLM.from_pretrained(TIED)
    untie_by_assignment(model)
    head = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(120)
    assert torch.equal(model.lm_head.weight[:103], head)
    assert not torch.equal(model.get_input_embeddings().weight[:103], head)
    model.set_input_embeddings(nn.Embedding(120, 24))
    assert torch.equal(model.lm_head.weight[:103], head)


def test_tensors_assigned_by_a_state_dict_are_still_tied(tmp_path):
    """`load_state_dict(assign=True)` makes two parameters over the same memory."""
    model = OPTForCausalLM.from_pretrained(TIED)
    model.load_state_dict(dict(model.state_dict()), assign=True)
    model.save_pretrained(tmp_path)
    assert OPTForCausalLM.from_pretrained(tmp_path).config.tie_word_embeddings is True


def test_memory_that_is_shared_in_other_steps_is_not_tied(tmp_path):
    model = OPTForCausalLM.from_pretrained(TIED)
    both = torch.randn(206, 24)
    model.get_input_embeddings().weight = nn.Parameter(both[:103])
    model.lm_head.weight = nn.Parameter(both[::2])
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(OPTForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)
