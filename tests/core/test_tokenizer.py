# SPDX-License-Identifier: Apache-2.0
"""OPTTokenizer: equal to the reference's recorded outputs, there and back, and its refusals."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_core import (
    FormatError,
    HubError,
    InputError,
    OPTTokenizer,
    UnsupportedError,
    tokenizer_files,
)
from opt_core.encodings import to_tensors

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
CASES: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text("utf-8"))
END = 2


@pytest.fixture
def tokenizer() -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(GOLDEN)


def load(case: dict[str, Any], folder: Path = GOLDEN) -> OPTTokenizer:
    options = dict(case["settings"])
    new = options.pop("add_tokens", [])
    tokenizer = OPTTokenizer.from_pretrained(folder, **options)
    tokenizer.add_tokens(new)
    return tokenizer


def call(tokenizer: OPTTokenizer, given_: Any, options: dict[str, Any]) -> dict[str, Any]:
    is_pair = isinstance(given_, list) and len(given_) == 2 and isinstance(given_[0], str)
    return dict(tokenizer(*given_, **options) if is_pair else tokenizer(given_, **options))


# ---- the reference's outputs -------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: str(case["settings"]))
def test_calls_and_decodes_equal_the_reference(case: dict[str, Any]) -> None:
    tokenizer = load(case)
    assert len(tokenizer) == case["length"]
    assert set(tokenizer.all_special_ids) == set(case["special_ids"])
    for given_, options, expected in case["calls"]:
        assert call(tokenizer, given_, options) == expected, (given_, options)
    for ids, skip, clean, text in case["decodes"]:
        assert tokenizer.decode(ids, skip, clean_up_tokenization_spaces=clean) == text, (ids, skip)


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: str(case["settings"]))
def test_saved_files_read_back_equal(case: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load(case)
    names = {path.name for path in tokenizer.save_pretrained(tmp_path)}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(isinstance(m, str) for m in read(tmp_path / "tokenizer.json")["model"]["merges"])
    whole = OPTTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for again in (whole, OPTTokenizer.from_pretrained(tmp_path)):
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.padding_side == tokenizer.padding_side
        assert again.model_max_length == tokenizer.model_max_length
        for given_, options, expected in case["calls"]:
            assert call(again, given_, options) == expected, (given_, options)


def test_tokens_equal_the_reference(tokenizer: OPTTokenizer) -> None:
    for text, tokens in zip(CASES["texts"], CASES["tokens_of_texts"], strict=True):
        assert tokenizer.tokenize(text) == tokens
        assert tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(tokens)) == tokens


def test_bytes_without_a_token_become_the_unknown_token() -> None:
    unknown = CASES["unknown_bytes"]
    files = OPTTokenizer.from_pretrained(GOLDEN)
    kept = [token for token in files.get_vocab() if token not in unknown["removed"]]
    merges = [
        tuple(m.split()) for m in (GOLDEN / "merges.txt").read_text("utf-8").split("\n")[1:-1]
    ]
    tokenizer = OPTTokenizer({token: index for index, token in enumerate(kept)}, merges)
    for text, ids in unknown["calls"]:
        assert tokenizer(text)["input_ids"] == ids


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    tokenizer = SHARED
    ids = tokenizer.encode(text)
    assert ids[0] == END
    assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_offsets_cover_the_text(text: str) -> None:
    spans = SHARED(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    covered = {place for start, stop in spans for place in range(start, stop)}
    assert covered == set(range(len(text)))


SHARED = OPTTokenizer.from_pretrained(GOLDEN)


# ---- what the slow tokenizer has not: offsets, windows, positions ------------------------------


def test_offsets_and_sequences_of_a_pair(tokenizer: OPTTokenizer) -> None:
    first, second = "The quick", "lazy dog"
    encoding = tokenizer(
        first, second, return_offsets_mapping=True, padding="max_length", max_length=20
    )
    kinds = encoding.sequence_ids()
    assert kinds[0] is None and kinds[-1] is None and {0, 1} <= set(kinds)
    for text, kind in ((first, 0), (second, 1)):
        own = [s for s, k in zip(encoding.offset_mapping, kinds, strict=True) if k == kind]
        assert "".join(text[start:stop] for start, stop in own) == text
    place = encoding.char_to_token(second.index("d"), sequence_index=1)
    assert encoding.char_to_token(0, second.index("d"), 1) == place
    start, stop = encoding.offset_mapping[place]
    assert start <= second.index("d") < stop
    assert encoding.word_ids()[0] is None and encoding.tokens()[0] == "</s>"


@pytest.mark.parametrize("side", ["left", "right"])
def test_windows_share_stride_tokens_and_cover_the_text(tokenizer: OPTTokenizer, side: str) -> None:
    tokenizer.truncation_side = side
    text = "over the lazy dog and through the door " * 3
    options = {"truncation": "only_second", "max_length": 12, "stride": 3}
    plain = tokenizer("one", text, truncation="only_second", max_length=12)
    windows = tokenizer("one", text, return_overflowing_tokens=True, **options)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert windows.input_ids[0] == plain.input_ids
    assert windows.overflow_to_sample_mapping == [0] * len(windows.input_ids)
    question = len(tokenizer("one", "")["input_ids"])
    parts = [row[question:] for row in windows.input_ids]
    if side == "left":
        parts.reverse()
    joined = parts[0]
    for part in parts[1:]:
        assert joined[-3:] == part[:3]
        joined = joined + part[3:]
    assert joined == whole


def test_windows_of_a_batch_know_their_text(tokenizer: OPTTokenizer) -> None:
    encoding = tokenizer(
        ["one", "the lazy dog " * 5, ""],
        truncation=True,
        max_length=8,
        padding=True,
        return_overflowing_tokens=True,
        return_tensors="np",
    )
    mapping = encoding.overflow_to_sample_mapping.tolist()
    assert mapping == sorted(mapping) and set(mapping) == {0, 1, 2}
    assert encoding.input_ids.shape == (len(mapping), 8)


# ---- settings -----------------------------------------------------------------------------------


def test_add_bos_token_can_be_switched(tokenizer: OPTTokenizer) -> None:
    with_bos = tokenizer("a", "b")["input_ids"]
    tokenizer.add_bos_token = False
    assert with_bos == [END, *tokenizer.encode("a"), END, *tokenizer.encode("b")]
    assert tokenizer.num_special_tokens_to_add(pair=True) == 0


def test_pad_token_can_be_renamed(tokenizer: OPTTokenizer) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == END
    with pytest.raises(InputError, match=r"add_special_tokens\(\{'pad_token': '<p>'\}\)"):
        tokenizer.pad_token = "<p>"
    assert tokenizer.add_special_tokens({"pad_token": "<p>"}) == 1
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    assert tokenizer("a<p>b")["input_ids"].count(tokenizer.pad_token_id) == 1
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="pad_token"):
        tokenizer(["a", "a b c d"], padding=True)


def test_padding_side_of_one_call(tokenizer: OPTTokenizer) -> None:
    row = tokenizer(["a", "The quick brown fox"], padding=True, padding_side="left")
    assert row["attention_mask"][0][0] == 0 and row["attention_mask"][0][-1] == 1
    assert tokenizer.padding_side == "right"


def test_vocabulary_grows_and_is_counted(tokenizer: OPTTokenizer) -> None:
    size = tokenizer.vocab_size
    assert tokenizer.add_tokens(["<one>", "<two>", "<one>"]) == 2
    assert (tokenizer.vocab_size, len(tokenizer)) == (size, size + 2)
    assert tokenizer.add_tokens("<end>", special_tokens=True) == 1
    assert tokenizer.decode(tokenizer.encode("a<end>"), skip_special_tokens=True) == "a"


def test_ids_without_a_token_decode_to_nothing(tokenizer: OPTTokenizer) -> None:
    ids = tokenizer.encode("a b")
    assert tokenizer.decode([*ids, len(tokenizer), 50271, -100]) == tokenizer.decode(ids)
    assert tokenizer.convert_ids_to_tokens([len(tokenizer)]) == [None]


def test_decode_takes_arrays_and_single_ids(tokenizer: OPTTokenizer) -> None:
    ids = tokenizer("The quick")["input_ids"]
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(ids) == "</s>The quick"
    assert tokenizer.decode(END) == tokenizer.decode(np.int64(END)) == "</s>"
    assert (
        tokenizer.batch_decode([np.array(ids), ids], skip_special_tokens=True) == ["The quick"] * 2
    )
    with pytest.raises(InputError, match="batch_decode"):
        tokenizer.decode([ids, ids])


# ---- encodings ----------------------------------------------------------------------------------


def test_encoding_is_a_dict_with_attributes(tokenizer: OPTTokenizer) -> None:
    encoding = tokenizer("a b", return_tensors="np")
    assert isinstance(encoding, dict) and list(encoding) == ["input_ids", "attention_mask"]
    assert encoding.input_ids is encoding["input_ids"]
    assert encoding.input_ids.dtype == np.int64 and encoding.input_ids.shape == (1, 4)
    assert pickle.loads(pickle.dumps(encoding)).tokens() == encoding.tokens()
    with pytest.raises(AttributeError, match="labels"):
        _ = encoding.labels
    with pytest.raises(InputError, match="return_tensors='pt'"):
        tokenizer("a").to("cpu")


def test_pad_joins_what_was_encoded_alone(tokenizer: OPTTokenizer) -> None:
    texts = ["a", "The quick brown fox", ""]
    together = tokenizer(texts, padding=True, pad_to_multiple_of=8, padding_side="left")
    alone = [tokenizer(text) for text in texts]
    joined = tokenizer.pad(alone, pad_to_multiple_of=8, padding_side="left", return_tensors="np")
    assert {key: value.tolist() for key, value in joined.items()} == dict(together)
    arrays = [{"input_ids": np.array(item["input_ids"])} for item in alone]
    assert tokenizer.pad(arrays, pad_to_multiple_of=8, padding_side="left") == together
    single = tokenizer.pad(alone[0], padding="max_length", max_length=4)
    assert single["input_ids"] == [*alone[0]["input_ids"], 1, 1]


@pytest.mark.parametrize(("name", "extra"), [("pt", "torch"), ("tf", "tf"), ("jax", "flax")])
def test_missing_framework_is_named(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module.partition(".")[0])

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(ImportError, match=rf"pip install 'opt-zoo\[{extra}\]'"):
        to_tensors({"input_ids": [[1]]}, name)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "options", "message"),
    [
        (["a", "The quick"], {"return_tensors": "np"}, "padding=True"),
        ("a", {"return_tensors": "numpy"}, "expected one of"),
        ("a", {"padding": "longets"}, "padding='longets'"),
        ("a", {"truncation": "first"}, "truncation='first'"),
        ("a", {"padding": 1}, "padding=1"),
        ("a", {"padding": True, "padding_side": "up"}, "padding_side='up'"),
        ("a", {"pad_to_multiple_of": 8}, "needs padding"),
        ("a", {"padding": True, "max_length": 8}, "would do nothing"),
        (7, {}, "expected a text"),
        (["a", 7], {}, "item 1 of the batch"),
        ([["a", "b", "c"]], {}, "item 0 of the batch"),
        ("\ud800", {}, "not valid Unicode"),
        (("one", "two"), {"truncation": "only_first", "max_length": 3}, "only_first"),
        ("a b c", {"truncation": True, "max_length": 0}, "max_length"),
        (
            ("The quick", "brown fox"),
            {"truncation": True, "max_length": 5, "return_overflowing_tokens": True},
            "only_second",
        ),
        (
            "The quick brown fox",
            {"truncation": True, "max_length": 3, "stride": 2, "return_overflowing_tokens": True},
            "stride=2",
        ),
    ],
)
def test_bad_calls_are_refused(
    tokenizer: OPTTokenizer, given_: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tokenizer(*given_, **options) if isinstance(given_, tuple) else tokenizer(given_, **options)


def test_unknown_arguments_name_the_nearest(tokenizer: OPTTokenizer) -> None:
    with pytest.raises(TypeError, match="'paddding'; did you mean 'padding'"):
        tokenizer("a", paddding=True)
    with pytest.raises(TypeError, match="'pading_side'; did you mean 'padding_side'"):
        OPTTokenizer.from_pretrained(GOLDEN, pading_side="left")


def test_lengths_that_nobody_names_are_warned_of(tokenizer: OPTTokenizer) -> None:
    with pytest.warns(UserWarning, match="max_length"):
        assert tokenizer("a b", truncation=True) == tokenizer("a b")
    with pytest.warns(UserWarning, match="max_length"):
        assert tokenizer("a b", padding="max_length") == tokenizer("a b")


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def damage(folder: Path, name: str, content: str | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content, "utf-8")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("merges.txt", None, HubError, "merges.txt"),
        ("vocab.json", None, HubError, "vocab.json"),
        ("vocab.json", '{"a": 0', FormatError, "vocab.json"),
        ("vocab.json", "[]", FormatError, "vocab.json"),
        ("vocab.json", '{"a": "0"}', FormatError, "integer"),
        ("vocab.json", '{"</s>": 0, "a": 0}', FormatError, "share 1 ids"),
        ("vocab.json", '{"</s>": 0, "a": 1}', FormatError, "do not fit"),
        ("merges.txt", "#version: 0.2\na b c\n", FormatError, "joins two tokens"),
        ("special_tokens_map.json", "{", FormatError, "special_tokens_map.json"),
        ("tokenizer.json", "{}", UnsupportedError, "byte-level BPE"),
        ("added_tokens.json", '{"<new>": 700}', FormatError, "declared as id 700"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, name: str, content: str | None, error: type[Exception], message: str
) -> None:
    folder = shutil.copytree(GOLDEN, tmp_path / "model")
    damage(folder, name, content)
    with pytest.raises(error, match=message):
        OPTTokenizer.from_pretrained(folder)


def test_tokenizers_of_other_models_are_refused(tmp_path: Path, tokenizer: OPTTokenizer) -> None:
    tokenizer.save_pretrained(tmp_path)
    document = read(tmp_path / "tokenizer.json")
    document["normalizer"] = {"type": "Lowercase"}
    damage(tmp_path, "tokenizer.json", json.dumps(document))
    with pytest.raises(UnsupportedError, match="Lowercase"):
        OPTTokenizer.from_pretrained(tmp_path)


def test_the_template_of_tokenizer_json_decides_where_the_config_is_silent(
    tmp_path: Path, tokenizer: OPTTokenizer
) -> None:
    """transformers 5 leaves add_bos_token out of tokenizer_config.json."""
    for add_bos_token in (True, False):
        tokenizer.add_bos_token = add_bos_token
        tokenizer.save_pretrained(tmp_path)
        config = read(tmp_path / "tokenizer_config.json")
        del config["add_bos_token"]
        damage(tmp_path, "tokenizer_config.json", json.dumps(config))
        assert OPTTokenizer.from_pretrained(tmp_path).add_bos_token is add_bos_token


def test_legacy_added_tokens_file_is_read(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN, tmp_path / "model")
    size = len(read(folder / "vocab.json"))
    damage(folder, "added_tokens.json", json.dumps({"<b>": size + 1, "<a>": size}))
    tokenizer = OPTTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["<a>", "<b>"]) == [size, size + 1]


def test_a_save_that_is_interrupted_changes_nothing(
    tokenizer: OPTTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File by file, the new vocabulary stood beside the former settings, and loaded without a word."""
    tokenizer.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = []

    def fails(path: Path, content: str) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError("no space left")
        path.write_text(content)

    monkeypatch.setattr(tokenizer_files, "atomic_write", fails)
    other = OPTTokenizer.from_pretrained(tmp_path, padding_side="left")
    with pytest.raises(OSError, match="no space left"):
        other.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_tokens_of_a_former_tokenizer_do_not_stay(tokenizer: OPTTokenizer, tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text('{"<former>": 400}')
    tokenizer.save_pretrained(tmp_path)
    stale = tmp_path / "added_tokens.json"
    assert not stale.exists() or "<former>" not in stale.read_text()
    assert len(OPTTokenizer.from_pretrained(tmp_path)) == len(tokenizer)
