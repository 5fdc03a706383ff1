# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT on our models: trained, saved, loaded, merged, and converted to the other frameworks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from torch import Tensor

from conversion import convert
from opt_core import UnsupportedError
from opt_core.loading import match
from opt_core.opening import open_weights
from opt_torch import OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification
from opt_torch.parts import Linear
from opt_torch.weights import canonical_arrays
from tests.cases import bits, case

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 2]])
#: Class of model, and what it learns from, by PEFT's name of the task.
TASKS: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "CAUSAL_LM": (OPTForCausalLM, {"labels": IDS}),
    "SEQ_CLS": (OPTForSequenceClassification, {"labels": torch.tensor([0, 1])}),
    "QUESTION_ANS": (
        OPTForQuestionAnswering,
        {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([1, 2])},
    ),
}


def load(task: str, name: str = "pre_norm") -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*initialised anew")
        return TASKS[task][0].from_pretrained(case(name).folder)


def adapted(task: str, name: str = "pre_norm", **options: Any) -> PeftModel:
    """A model whose adapter has learnt for three steps."""
    config = LoraConfig(task_type=task, r=4, lora_alpha=8, **options)
    model = get_peft_model(load(task, name), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(input_ids=IDS, **TASKS[task][1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def scores(model: Any) -> Tensor:
    output = model(input_ids=IDS)
    return output.start_logits if "start_logits" in output else output.logits


def weights(model: Any) -> dict[str, Any]:
    rows = canonical_arrays(model, model.config, model.architecture)
    return {param.name: read().copy() for param, _, read in rows}


@pytest.mark.parametrize("task", [*TASKS])
def test_an_adapter_learns_is_saved_and_loads(task: str, tmp_path: Path) -> None:
    """The default targets are found by the model's type; the base does not change."""
    before, plain = weights(load(task)), scores(load(task))
    model = adapted(task)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-4] for name in names if "lora_" in name} == {"q_proj", "v_proj"}
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    assert (scores(model) - plain).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(task), tmp_path).eval()
    assert torch.equal(scores(again), scores(model))
    assert (
        bits(weights(model.unload())).items()
        >= {
            name: value for name, value in bits(before).items() if name.startswith("model.")
        }.items()
    )


@pytest.mark.parametrize("task", [*TASKS])
def test_a_merged_adapter_is_our_model_in_every_format(task: str, tmp_path: Path) -> None:
    """Loading these files in TensorFlow and JAX is tested elsewhere; here, that they hold the weights."""
    model = adapted(task)
    expected = scores(model)
    merged = model.merge_and_unload()
    assert type(merged) is TASKS[task][0]
    assert type(merged.model.decoder.layers[0].self_attn.q_proj) is Linear
    torch.testing.assert_close(scores(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    again = TASKS[task][0].from_pretrained(tmp_path / "merged")
    assert torch.equal(scores(again), scores(merged))
    for format in ("h5", "msgpack"):
        convert(tmp_path / "merged", tmp_path / format, to=format)
        with open_weights(tmp_path / format) as reader:
            sources, report = match(merged.config, merged.architecture, reader)
            assert not (report.missing or report.missing_head or report.unexpected)
            found = {name: source.read("torch") for name, source in sources.items()}
        assert bits(found) == bits(weights(merged))


def test_an_adapted_model_generates_as_the_merged_one() -> None:
    model = adapted("CAUSAL_LM")
    found = model.generate(input_ids=IDS[:, :2], max_new_tokens=5, num_beams=2)
    merged = model.merge_and_unload()
    expected = merged.generate(IDS[:, :2], max_new_tokens=5, num_beams=2)
    assert torch.equal(found, expected)
    assert not torch.equal(found, load("CAUSAL_LM").generate(IDS[:, :2], max_new_tokens=5))


def test_checkpointed_layers_give_an_adapter_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load("CAUSAL_LM")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.dropout = 0.0
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).train()
        torch.manual_seed(1)
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 12
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
    with pytest.raises(UnsupportedError, match="use_reentrant"):
        load("CAUSAL_LM").gradient_checkpointing_enable({"use_reentrant": True})


def test_a_model_is_frozen_as_peft_prepares_it() -> None:
    model = load("CAUSAL_LM")
    assert prepare_model_for_kbit_training(model) is model
    assert not any(p.requires_grad for p in model.parameters())


def test_peft_warns_of_an_adapter_on_a_tied_head() -> None:
    """Merging it would change the word embeddings too. An untied head may have one."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        get_peft_model(load("CAUSAL_LM"), config)
    model = adapted("CAUSAL_LM", "untied_gelu", target_modules=["q_proj", "fc1", "lm_head"])
    expected = scores(model)
    torch.testing.assert_close(scores(model.merge_and_unload()), expected)


def test_all_linear_layers_but_the_head() -> None:
    """PEFT leaves the head out by itself only in transformers' models."""
    model = adapted("CAUSAL_LM", target_modules="all-linear", exclude_modules=["lm_head"])
    names = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    expected = scores(model)
    torch.testing.assert_close(scores(model.merge_and_unload()), expected)


def test_targets_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="Target modules {'query'} not found"):
        get_peft_model(load("CAUSAL_LM"), LoraConfig(target_modules=["query"]))


def test_learnt_prompts_are_trained_but_never_left_out_in_silence() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(load("CAUSAL_LM"), config)
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0
    with pytest.raises(UnsupportedError, match="prompt tuning"):
        model.generate(input_ids=IDS, max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_modules_to_save_are_merged_and_saved(tmp_path: Path) -> None:
    """Embedding and head learn apart; the head was lost when the merged model was saved."""
    targets = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    merged = adapted("CAUSAL_LM", **targets).merge_and_unload()
    assert not torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)
    merged.save_pretrained(tmp_path)
    again = OPTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, merged(IDS).logits)


def test_peft_is_told_that_the_head_is_tied() -> None:
    """`config.to_dict()` did not say so, and tokens that were trained were merged into one of the two."""
    model = adapted("CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[5, 6])
    expected = model(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected)


def test_an_adapter_that_is_not_merged_is_no_checkpoint(tmp_path: Path) -> None:
    base = adapted("CAUSAL_LM").get_base_model()
    with pytest.raises(UnsupportedError, match=r"q_proj\.lora_A.*an adapter.*Merge"):
        base.save_pretrained(tmp_path)
