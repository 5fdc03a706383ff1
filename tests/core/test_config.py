# SPDX-License-Identifier: Apache-2.0
"""`OPTConfig`: defaults and JSON of the reference, and messages for what is no OPT."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_core import ConfigError, OPTConfig
from opt_core.config import ACTIVATIONS
from opt_core.presets import PRESETS
from tests.cases import CASES, GOLDEN, case

#: transformers 4.37.2, `configuration_opt.py:100-151`.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "layerdrop": 0.0,
    "init_std": 0.02,
    "use_cache": True,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
}
SIZES = {  # layers, hidden size, heads, word embedding size
    "opt-125m": (12, 768, 12, 768),
    "opt-350m": (24, 1024, 16, 512),
    "opt-1.3b": (24, 2048, 32, 2048),
    "opt-2.7b": (32, 2560, 32, 2560),
    "opt-6.7b": (32, 4096, 32, 4096),
    "opt-13b": (40, 5120, 40, 5120),
    "opt-30b": (48, 7168, 56, 7168),
    "opt-66b": (64, 9216, 72, 9216),
    "opt-175b": (96, 12288, 96, 12288),
}
CONFIGS = sorted(GOLDEN.glob("**/config.json"))


def test_arguments_and_defaults_are_the_reference_page() -> None:
    parameters = inspect.signature(OPTConfig).parameters
    found = {name: p.default for name, p in parameters.items() if name != "kwargs"}
    assert list(found.items()) == list(DEFAULTS.items())
    assert OPTConfig().word_embed_proj_dim == 768


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_a_config_of_the_reference_goes_there_and_back(path: Path) -> None:
    original = json.loads(path.read_text())
    config = OPTConfig.from_json_file(path)
    written = json.loads(config.to_json_string())
    original.pop("transformers_version")
    same = {key: written.get(key) for key in original}
    assert same == original
    assert OPTConfig.from_dict(written) == config


def test_there_are_configs_of_the_reference() -> None:
    assert len(CONFIGS) >= len(CASES) + 30


@pytest.mark.parametrize("name", CASES)
def test_the_options_of_the_cases_arrive(name: str) -> None:
    golden = case(name)
    for option, value in golden.facts["changes"].items():
        assert getattr(golden.config, option) == value


@pytest.mark.parametrize("size", SIZES)
def test_the_published_sizes(size: str) -> None:
    layers, hidden, heads, embed = SIZES[size]
    config = OPTConfig.preset(size)
    assert (config.num_hidden_layers, config.hidden_size) == (layers, hidden)
    assert (config.num_attention_heads, config.word_embed_proj_dim) == (heads, embed)
    assert config.ffn_dim == 4 * hidden
    assert config.do_layer_norm_before is (size != "opt-350m")
    assert (config.vocab_size, config.max_position_embeddings) == (50272, 2048)
    assert config == OPTConfig.preset(f"facebook/{size}")
    assert OPTConfig.preset(size, dropout=0.0).dropout == 0.0


def test_the_head_size_of_the_odd_one() -> None:
    assert OPTConfig.preset("opt-2.7b").head_dim == 80


def test_the_defaults_are_the_smallest_size() -> None:
    assert OPTConfig.preset("opt-125m") == OPTConfig()
    assert tuple(SIZES) == PRESETS


# --- what OPT does not know -----------------------------------------------------------------------


def test_unknown_arguments_are_kept_and_written(tmp_path: Path) -> None:
    config = OPTConfig(prefix="</s>", embed_dim=16, nested={"a": [1, None]})
    assert (config.prefix, config.embed_dim, config.nested) == ("</s>", 16, {"a": [1, None]})
    config.save_pretrained(tmp_path)
    again = OPTConfig.from_pretrained(tmp_path)
    assert again.nested == {"a": [1, None]} and "prefix" in again and again == config
    assert again.get("prefix") == "</s>" and again.get("suffix", 3) == 3


def test_keywords_of_fetching_are_no_fields(tmp_path: Path) -> None:
    """`use_auth_token="..."` was written into config.json by the next save."""
    OPTConfig(embed_dim=16).save_pretrained(tmp_path)
    config = OPTConfig.from_pretrained(
        tmp_path,
        use_auth_token="a-secret",
        trust_remote_code=True,
        resume_download=True,
        proxies=None,
        token="another-secret",
        force_download=True,
        embed_dim=32,  # of the file
        max_length=50,  # of generation, as old files have it
        num_labels=3,
    )
    assert config.extra == {"embed_dim": 32, "max_length": 50} and config.num_labels == 3
    with pytest.warns(UserWarning, match="proxies has no effect.*HTTPS_PROXY"):
        assert OPTConfig.from_pretrained(tmp_path, proxies={"https": "x"}).extra == {
            "embed_dim": 16
        }


def test_keywords_that_are_no_fields_are_ignored_and_named(tmp_path: Path) -> None:
    OPTConfig().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="hiden_size is ignored.*Did you mean 'hidden_size'"):
        assert OPTConfig.from_pretrained(tmp_path, hiden_size=16) == OPTConfig()
    with pytest.warns(UserWarning, match="extra is ignored"):
        assert not OPTConfig.from_pretrained(tmp_path, extra={"token": "a-secret"}).extra
    config, unused = OPTConfig.from_pretrained(
        tmp_path, foo=1, dropout=0.0, token="a-secret", return_unused_kwargs=True
    )
    assert (config, unused) == (OPTConfig(dropout=0.0), {"foo": 1})


def test_an_unknown_attribute_names_the_nearest() -> None:
    with pytest.raises(AttributeError, match="no attribute 'hiden_size'.*'hidden_size'"):
        OPTConfig().hiden_size  # noqa: B018


def test_labels() -> None:
    assert OPTConfig().num_labels == 2
    config = OPTConfig(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id["LABEL_2"] == 2
    named = OPTConfig(id2label={"0": "no", "1": "yes", "2": "perhaps"})
    assert named.num_labels == 3 and named.id2label[1] == "yes"
    assert OPTConfig.from_dict(named.to_dict()).id2label == named.id2label
    assert OPTConfig.from_dict(named.to_dict(), num_labels=5).num_labels == 5
    with pytest.raises(ConfigError, match="num_labels=2, but id2label names 3"):
        OPTConfig(id2label=named.id2label, num_labels=2)


def test_a_dtype_under_its_old_and_its_new_name() -> None:
    assert OPTConfig(torch_dtype="float16").torch_dtype == "float16"
    assert OPTConfig(dtype="bfloat16").torch_dtype == "bfloat16"
    assert OPTConfig(torch_dtype="torch.float16").to_dict()["torch_dtype"] == "float16"


def test_another_model_type() -> None:
    with pytest.raises(ConfigError, match="model_type 'opt', found 'gpt2'"):
        OPTConfig.from_dict({"model_type": "gpt2", "n_embd": 3})
    assert OPTConfig.from_dict({"hidden_size": 24}).hidden_size == 24  # old files do not say


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[1]", "expected a JSON object, found list"), ("\xff", "JSON")],
)
def test_files_that_hold_no_config(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message) as error:
        OPTConfig.from_json_file(path)
    assert str(path) in str(error.value)


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        OPTConfig.from_pretrained(tmp_path)


def test_values_that_are_no_json() -> None:
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        OPTConfig(thing=object()).to_json_string()


# --- validation -----------------------------------------------------------------------------------

INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "heads": (
        {"hidden_size": 100, "num_attention_heads": 12},
        "hidden_size=100 .* num_attention_h",
    ),
    "activation": ({"activation_function": "rellu"}, "unknown activation 'rellu'. Known: gelu, "),
    "vocabulary": ({"vocab_size": 0}, "vocab_size: expected a whole number from 1 on, found 0"),
    "float": ({"hidden_size": 768.0}, r"hidden_size: .* found 768\.0"),
    "text": ({"num_hidden_layers": "12"}, "num_hidden_layers: .* found '12'"),
    "truth as a number": ({"ffn_dim": True}, "ffn_dim: .* found True"),
    "number as a truth": ({"enable_bias": 1}, "enable_bias: expected True or False, found 1"),
    "probability": ({"dropout": 1.5}, "dropout: expected a number from 0 to 1"),
    "negative probability": ({"layerdrop": -0.1}, "layerdrop: expected a number from 0 to 1"),
    "deviation": ({"init_std": -1.0}, "init_std: expected a number from 0 on"),
    "not a number": ({"init_std": float("nan")}, "init_std"),
    "pad": ({"pad_token_id": 50272}, r"pad_token_id=50272 .*vocab_size=50272"),
    "negative pad": ({"pad_token_id": -1}, "pad_token_id=-1"),
    "end": ({"eos_token_id": [2, "x"]}, "eos_token_id: expected a token id or None"),
    "list of starts": ({"bos_token_id": [1, 2]}, "bos_token_id"),
}


@pytest.mark.parametrize("what", INVALID)
def test_invalid_values(what: str) -> None:
    options, message = INVALID[what]
    with pytest.raises(ConfigError, match=message):
        OPTConfig(**options)
    with pytest.raises(ConfigError, match=message):
        OPTConfig().replace(**options)


def test_every_known_activation_is_valid() -> None:
    for name in ACTIVATIONS:
        assert OPTConfig(activation_function=name).activation_function == name


def test_several_ends() -> None:
    assert OPTConfig(eos_token_id=[2, 5]).eos_token_ids == (2, 5)
    assert OPTConfig(eos_token_id=2).eos_token_ids == (2,)
    assert OPTConfig(eos_token_id=None).eos_token_ids == ()


def test_replace_makes_a_copy() -> None:
    config = OPTConfig(prefix="</s>", name_or_path="here")
    other = config.replace(dropout=0.5)
    assert (config.dropout, other.dropout) == (0.1, 0.5)
    assert (other.prefix, other.name_or_path) == ("</s>", "here")
    assert config != other and hash(config) != hash(other)
    assert config == config.replace() and hash(config) == hash(config.replace())


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "num_hidden_layers": st.integers(0, 200),
            "dropout": st.floats(0, 1),
            "init_std": st.floats(0, 1e3),
            "activation_function": st.sampled_from(ACTIVATIONS),
            "pad_token_id": st.none() | st.integers(0, 50271),
            "eos_token_id": st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9)),
            "tie_word_embeddings": st.booleans(),
            "return_dict": st.booleans(),
            "output_hidden_states": st.booleans(),
            "torch_dtype": st.sampled_from([None, "float16", "bfloat16"]),
            "architectures": st.sampled_from([None, ["OPTModel"]]),
            "num_labels": st.integers(1, 5),
            "problem_type": st.sampled_from([None, "regression"]),
            "comment": st.text() | st.lists(st.integers()),
        },
    )
)
def test_json_there_and_back(options: dict[str, Any]) -> None:
    config = OPTConfig(**options)
    again = OPTConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config
    for name in options:
        assert getattr(again, name) == getattr(config, name)


def test_what_callers_of_transformers_do() -> None:
    config = OPTConfig(eos_token_id=(2, 3), label2id={"neg": 0, "pos": 1})
    assert config.eos_token_id == [2, 3]
    assert OPTConfig.from_dict(config.to_dict()) == config
    assert OPTConfig.from_dict(config.to_dict()).label2id == {"neg": 0, "pos": 1}
    config._name_or_path = "somewhere"  # as adapter libraries set it
    assert config.name_or_path == "somewhere"


@pytest.mark.parametrize("value", [[1], [None], ["OPTModel", 2.5], "OPTModel", {"a": 1}, [["x"]]])
def test_architectures_are_names(value: Any) -> None:
    """Found by the fuzzer: a number among them was an AttributeError wherever the class was asked for."""
    with pytest.raises(ConfigError, match="architectures: expected a list"):
        OPTConfig.from_dict({"model_type": "opt", "architectures": value})
