# SPDX-License-Identifier: Apache-2.0
"""The parameter table against checkpoints of the reference, and what is derived from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from safetensors import safe_open

from opt_core import OPTConfig
from opt_core.params import (
    ARCHITECTURES,
    CONVENTIONS,
    DECODER_PARAMS,
    FRAMEWORKS,
    TIED_HEAD_NAME,
    Kind,
    num_parameters,
    param_table,
)
from tests.cases import CASES, GOLDEN, MODELS, case

SMALL = OPTConfig(vocab_size=10, hidden_size=8, num_attention_heads=2, ffn_dim=12)


def shapes(config: OPTConfig, architecture: str = "OPTForCausalLM") -> dict[str, tuple[int, ...]]:
    return {param.name: param.shape for param in param_table(config, architecture)}


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_those_of_the_reference(name: str) -> None:
    golden = case(name)
    assert shapes(golden.config) == {key: array.shape for key, array in golden.weights.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_reference_counts_the_same(name: str) -> None:
    golden = case(name)
    assert num_parameters(golden.config) == sum(array.size for array in golden.weights.values())


def test_the_counts_of_the_largest_and_the_odd_one() -> None:
    assert num_parameters(OPTConfig.preset("opt-350m")) == 331_196_416
    assert num_parameters(OPTConfig.preset("opt-175b")) == 174_604_468_224


@pytest.mark.parametrize("model", MODELS)
def test_paths_in_flax_are_those_of_the_reference(model: str) -> None:
    """Names, and the transposed shapes that go with them."""
    for folder, architecture in (
        ("flax_safetensors", "OPTForCausalLM"),
        ("flax_safetensors_base", "OPTModel"),
        ("flax_safetensors_untied", "OPTForCausalLM"),
    ):
        path = GOLDEN / "formats" / model / folder
        config = OPTConfig.from_json_file(path / "config.json")
        with safe_open(path / "model.safetensors", "np") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        expected = {
            ".".join(param.path("flax", architecture)): param.shape[
                :: -1 if param.transposed("flax") else 1
            ]
            for param in param_table(config, architecture)
        }
        assert found == expected


def test_every_framework_has_a_convention_for_every_kind() -> None:
    assert FRAMEWORKS == ("torch", "tf", "flax")
    for conventions in CONVENTIONS.values():
        assert set(conventions) == set(Kind)


def test_only_matrices_of_layers_are_transposed() -> None:
    for param in param_table(SMALL.replace(word_embed_proj_dim=4, tie_word_embeddings=False)):
        turned = [param.transposed(framework) for framework in FRAMEWORKS]
        assert turned == [False, *[param.spec.kind is Kind.LINEAR] * 2], param.name


@pytest.mark.parametrize(
    ("changes", "gone", "new"),
    [
        ({"enable_bias": False}, ".bias", ""),
        ({"_remove_final_layer_norm": True}, "model.decoder.final_layer_norm", ""),
        ({"do_layer_norm_before": False}, "model.decoder.final_layer_norm", ""),
        ({"word_embed_proj_dim": 4}, "", "model.decoder.project_"),
        ({"tie_word_embeddings": False}, "", TIED_HEAD_NAME),
    ],
)
def test_what_an_option_adds_and_takes(changes: dict[str, object], gone: str, new: str) -> None:
    before, after = shapes(SMALL), shapes(SMALL.replace(**changes))
    assert bool(before.keys() - after.keys()) == bool(gone)
    assert bool(after.keys() - before.keys()) == bool(new)
    assert all(gone in name for name in before.keys() - after.keys())
    assert all(name.startswith(new) for name in after.keys() - before.keys())


def test_without_norm_parameters_no_norm_is_named() -> None:
    names = shapes(SMALL.replace(layer_norm_elementwise_affine=False))
    assert not [name for name in names if "norm" in name]


def test_without_biases_norms_keep_theirs() -> None:
    names = shapes(SMALL.replace(enable_bias=False))
    assert all("norm" in name for name in names if name.endswith("bias"))
    assert "model.decoder.final_layer_norm.bias" in names


def test_heads() -> None:
    config = SMALL.replace(num_labels=5, enable_bias=False)
    base = shapes(config, "OPTModel")
    added = {a: shapes(config, a).items() - base.items() for a in ARCHITECTURES}
    assert added == {
        "OPTModel": set(),
        "OPTForCausalLM": set(),
        "OPTForSequenceClassification": {("score.weight", (5, 8))},
        "OPTForQuestionAnswering": {("qa_outputs.weight", (2, 8)), ("qa_outputs.bias", (2,))},
    }


def test_a_base_model_is_its_own_base() -> None:
    param = param_table(SMALL, "OPTModel")[0]
    assert param.path("torch", "OPTModel") == ("decoder", "embed_tokens", "weight")
    assert param.path("tf", "OPTForCausalLM") == ("model", "decoder", "embed_tokens", "embeddings")


def test_names_are_unique_and_layers_are_counted() -> None:
    config = SMALL.replace(num_hidden_layers=11)
    names = [param.name for param in param_table(config)]
    assert len(names) == len(set(names))
    layers = {int(name.split(".")[3]) for name in names if ".layers." in name}
    assert layers == set(range(11))
    assert not [n for n in shapes(SMALL.replace(num_hidden_layers=0)) if ".layers." in n]


def test_tensor_parallel_splits_fall_on_whole_heads() -> None:
    """Columns then rows: no communication between the two halves of a block."""
    dims = {spec.name.split("layers.{layer}.")[-1]: spec.split_dim() for spec in DECODER_PARAMS}
    assert dims["self_attn.q_proj.weight"] == dims["self_attn.q_proj.bias"] == 0
    assert dims["self_attn.out_proj.weight"] == 1 and dims["self_attn.out_proj.bias"] is None
    assert (dims["fc1.weight"], dims["fc2.weight"], dims["fc2.bias"]) == (0, 1, None)
    assert dims["model.decoder.embed_tokens.weight"] == 0
    assert dims["model.decoder.embed_positions.weight"] is None


def test_a_shape_is_explained_by_the_config() -> None:
    spec = next(s for s in DECODER_PARAMS if s.name.endswith("fc1.weight"))
    assert spec.explain(SMALL) == "ffn_dim=12, hidden_size=8"
    positions = DECODER_PARAMS[1]
    assert positions.shape(SMALL) == (2050, 8)
    assert positions.explain(SMALL).startswith("max_position_embeddings + 2=2050")


def test_counting_needs_no_memory() -> None:
    config = OPTConfig.preset("opt-175b")
    total = sum(math.prod(param.shape) for param in param_table(config))
    assert num_parameters(config) == total > np.iinfo(np.int32).max
