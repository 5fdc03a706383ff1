# SPDX-License-Identifier: Apache-2.0
"""Linear layers quantized by torchao and bitsandbytes, as their own documentation says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

from opt_core import UnsupportedError
from opt_core.assets import TINY_SUMS
from opt_torch import OPTForCausalLM, OPTTokenizer
from opt_torch.parts import Linear

TEXTS = ["forty-two plus seventeen is", "ninety minus eleven is"]


def is_layer(module: nn.Module, name: str) -> bool:
    """All but the head, which is the word embeddings again."""
    return isinstance(module, nn.Linear) and name != "lm_head"


def by_torchao(config: object) -> Callable[[OPTForCausalLM], None]:
    return lambda model: quantize_(model, config, filter_fn=is_layer)


def by_bitsandbytes(make: Callable[..., nn.Linear]) -> Callable[[OPTForCausalLM], None]:
    def quantize(model: OPTForCausalLM) -> None:
        for name, layer in [*model.named_modules()]:
            if is_layer(layer, name):
                parent, _, leaf = name.rpartition(".")
                rounded = make(layer.in_features, layer.out_features)
                rounded.load_state_dict(layer.state_dict())
                model.get_submodule(parent).add_module(leaf, rounded.to("cpu").eval())

    return quantize


#: How, and the largest error of a logit, as a part of the largest logit: about twice what is found.
WAYS: dict[str, tuple[Callable[[OPTForCausalLM], None], float]] = {
    "torchao, weights": (by_torchao(Int8WeightOnlyConfig()), 0.01),
    "torchao, activations too": (by_torchao(Int8DynamicActivationInt8WeightConfig()), 0.02),
    "bitsandbytes, 8 bits": (
        by_bitsandbytes(lambda i, o: Linear8bitLt(i, o, has_fp16_weights=False)),
        0.01,
    ),
    "bitsandbytes, nf4": (
        by_bitsandbytes(
            lambda i, o: Linear4bit(i, o, quant_type="nf4", compute_dtype=torch.float32)
        ),
        0.15,
    ),
}


def load() -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(TINY_SUMS)


@pytest.fixture(params=[*WAYS])
def quantized(request: pytest.FixtureRequest) -> tuple[OPTForCausalLM, float]:
    quantize, error = WAYS[request.param]
    model = load()
    quantize(model)
    return model, error


@torch.no_grad()
def test_logits_and_tokens_stay_close(quantized: tuple[OPTForCausalLM, float]) -> None:
    model, error = quantized
    tokenizer = OPTTokenizer.from_pretrained(TINY_SUMS)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    expected, found = load()(**batch).logits, model(**batch).logits
    apart = (found - expected).abs().max() / expected.abs().max()
    assert 0 < apart < error
    assert model.lm_head.weight is model.get_input_embeddings().weight

    def answers(model: OPTForCausalLM) -> Tensor:
        return model.generate(**batch, max_new_tokens=5)

    assert torch.equal(answers(model), answers(load()))


@pytest.mark.parametrize("way", ["torchao, weights", "bitsandbytes, 8 bits", "bitsandbytes, nf4"])
def test_gradients_pass_through_rounded_weights(way: str) -> None:
    """What adapters need. Through torchao's rounded activations none pass: those are for inference."""
    model = load()
    WAYS[way][0](model)
    model.train().requires_grad_(False)
    ids = torch.tensor([[5, 6, 7, 8]])
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embeds, labels=ids).loss.backward()
    plain = load().train()
    expected = plain.get_input_embeddings()(ids).detach().requires_grad_()
    plain(inputs_embeds=expected, labels=ids).loss.backward()
    cosine = torch.cosine_similarity(embeds.grad.flatten(), expected.grad.flatten(), dim=0)
    assert cosine > 0.9


def test_a_quantized_model_is_not_saved(
    quantized: tuple[OPTForCausalLM, float], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=r"q_proj.weight.*the model is quantized"):
        quantized[0].save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_layers_that_torchao_has_quantized_stay_ours() -> None:
    model = load()
    WAYS["torchao, weights"][0](model)
    layers = [module for name, module in model.named_modules() if is_layer(module, name)]
    assert len(layers) == 12 and {type(layer) for layer in layers} == {Linear}
    assert model.prepare_for_decoding(batch_size=8) is model  # which finds nothing to pack
    assert all(layer.decoding_weight is None for layer in layers)
