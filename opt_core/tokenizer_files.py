# SPDX-License-Identifier: Apache-2.0
"""The files of a tokenizer: reads what the hub carries (old and new spellings), writes what all can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from opt_core.errors import FormatError, HubError, UnsupportedError
from opt_core.files import atomic_write, parse_json_object

NAMED_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

# Entries of tokenizer_config.json that change what the tokenizer does; others are notes to people.
SETTINGS = (
    "add_bos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "errors",
    "model_max_length",
    "padding_side",
    "truncation_side",
)

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": True,
}


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as data: `options` are keyword arguments of OPTTokenizer, tokens as str or AddedToken."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added_tokens: dict[int, AddedToken]
    options: dict[str, Any]


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read tokenizer.json, or else vocab.json and merges.txt, and the configuration files beside them.

    Raises HubError if neither is there, FormatError if a file is damaged, and UnsupportedError if
    tokenizer.json describes something else than byte-level BPE.
    """
    config = _read_object(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        vocab, merges, added_tokens, has_bos = _read_document(folder / "tokenizer.json")
        config.setdefault("add_bos_token", has_bos)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = _checked_vocab(_read_object(folder / "vocab.json"), folder / "vocab.json")
        merges = _read_merges(folder / "merges.txt")
        added_tokens = {}
    else:
        raise HubError(
            f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt; "
            f"found {sorted(path.name for path in folder.glob('*'))}"
        )
    options = {name: config[name] for name in SETTINGS if config.get(name) is not None}
    options |= _special_tokens(folder, config)
    added_tokens |= _added_tokens(folder, config, options)
    _fill_defaults(folder, vocab.keys() | {str(t.content) for t in added_tokens.values()}, options)
    return TokenizerFiles(vocab, merges, added_tokens, options)


def write_tokenizer(folder: Path, files: TokenizerFiles, engine_json: str) -> list[Path]:
    """Write five files (and added_tokens.json if needed) into `folder`, all at once or not at all.

    transformers 4.37.2 to 5.x and CTranslate2 read them. `engine_json` is `Tokenizer.to_str()`.
    """
    beyond = {
        str(token.content): index
        for index, token in files.added_tokens.items()
        if str(token.content) not in files.vocab
    }
    tokens = {k: _as_json(v) for k, v in files.options.items() if k not in SETTINGS}
    config = {k: v for k, v in files.options.items() if k in SETTINGS}
    config |= {name: _plain(token) for name, token in tokens.items()}
    config["added_tokens_decoder"] = {str(k): _as_json(v) for k, v in files.added_tokens.items()}
    config["tokenizer_class"] = "GPT2Tokenizer"
    merges = "".join(f"{left} {right}\n" for left, right in files.merges)
    texts = {
        "tokenizer.json": _dump(_document(engine_json, files)),
        "vocab.json": _dump(files.vocab),
        "merges.txt": "#version: 0.2\n" + merges,
        "tokenizer_config.json": _dump(dict(sorted(config.items()))),
        "special_tokens_map.json": _dump(dict(sorted(tokens.items()))),
    }
    if beyond:
        texts["added_tokens.json"] = _dump(beyond)
    from opt_core.staging import staged

    with staged(folder, obsolete=lambda name: name == "added_tokens.json") as stage:
        for name, text in texts.items():
            atomic_write(stage / name, text)
    return [folder / name for name in texts]


def _document(engine_json: str, files: TokenizerFiles) -> dict[str, Any]:
    """Return tokenizer.json with merges as "a b" (all that tokenizers < 0.20 reads) and the bos template."""
    document: dict[str, Any] = json.loads(engine_json)
    document["model"]["merges"] = [f"{left} {right}" for left, right in files.merges]
    document["pre_tokenizer"]["add_prefix_space"] = files.options["add_prefix_space"]
    document["added_tokens"] = [{"id": k, **_as_json(v)} for k, v in files.added_tokens.items()]
    document["post_processor"] = _BYTE_LEVEL
    if files.options["add_bos_token"]:
        bos = str(files.options["bos_token"].content)
        index = next(k for k, v in files.added_tokens.items() if str(v.content) == bos)

        def special(sequence: int) -> dict[str, Any]:
            return {"SpecialToken": {"id": bos, "type_id": sequence}}

        def text(name: str, sequence: int) -> dict[str, Any]:
            return {"Sequence": {"id": name, "type_id": sequence}}

        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [special(0), text("A", 0)],
            "pair": [special(0), text("A", 0), special(1), text("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
        }
    return document


def _read_document(
    path: Path,
) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, AddedToken], bool]:
    """Return vocabulary, merges, added tokens, and whether a template puts a token before a text."""
    document = _read_object(path)
    parts = {
        "model": _type_of(document.get("model")),
        "pre_tokenizer": _type_of(document.get("pre_tokenizer")),
        "normalizer": _type_of(document.get("normalizer")),
    }
    if parts != {"model": "BPE", "pre_tokenizer": "ByteLevel", "normalizer": None}:
        raise UnsupportedError(
            f"{path}: an OPT tokenizer is byte-level BPE without a normalizer, found {parts}; "
            "load it with the `tokenizers` library instead"
        )
    try:
        model = document["model"]
        vocab = _checked_vocab(model["vocab"], path)
        merges = [_pair(m.split(" ") if isinstance(m, str) else m, path) for m in model["merges"]]
        added = {token["id"]: _as_token(token) for token in document["added_tokens"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path}: not a tokenizer.json ({type(error).__name__}: {error})"
        ) from error
    return vocab, merges, added, _type_of(document.get("post_processor")) == "TemplateProcessing"


def _type_of(part: Any) -> Any:
    # Files written before tokenizers 0.9 leave out the model's type; only BPE has merges.
    if not isinstance(part, dict):
        return part
    return part.get("type", "BPE" if "merges" in part else None)


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error}); fetch the file again") from error
    if lines[0].startswith("#version"):
        del lines[0]
    return [_pair(line.split(), path) for line in lines if line.strip()]


def _pair(parts: Any, path: Path) -> tuple[str, str]:
    if len(parts) != 2:
        raise FormatError(
            f"{path}: a merge joins two tokens, found {parts!r}; fetch the file again"
        )
    return parts[0], parts[1]


def _checked_vocab(vocab: Any, path: Path) -> dict[str, int]:
    if not isinstance(vocab, dict) or not all(type(index) is int for index in vocab.values()):
        raise FormatError(f"{path}: the vocabulary must be an object of token -> integer id")
    if len(set(vocab.values())) != len(vocab):
        raise FormatError(f"{path}: {len(vocab)} tokens share {len(set(vocab.values()))} ids")
    return vocab


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the declared tokens; special_tokens_map.json wins over a config without added_tokens_decoder."""
    declared = _read_object(folder / "special_tokens_map.json")
    both = {**declared, **config} if "added_tokens_decoder" in config else {**config, **declared}
    special = {name: _as_token(both[name]) for name in NAMED_SPECIAL_TOKENS if name in both}
    for name in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(both.get(name), list):
            special["additional_special_tokens"] = [_as_token(token) for token in both[name]]
    return special


def _added_tokens(
    folder: Path, config: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[int, AddedToken]:
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return {int(index): _as_token(token) for index, token in decoder.items()}
    special = {str(options[name]) for name in NAMED_SPECIAL_TOKENS if name in options}
    legacy = _read_object(folder / "added_tokens.json")
    return {
        index: AddedToken(token, normalized=token not in special, special=token in special)
        for token, index in legacy.items()
    }


def _fill_defaults(folder: Path, known: set[str], options: dict[str, Any]) -> None:
    """Leave undeclared special tokens to the defaults of OPT if the vocabulary has them, else object."""
    missing = [n for n in ("bos_token", "eos_token", "unk_token") if n not in options]
    if missing and "</s>" not in known:
        raise FormatError(
            f"{folder}: no file names {', '.join(missing)} and the vocabulary has no '</s>': "
            "this is not an OPT tokenizer; pass the tokens as keyword arguments to OPTTokenizer"
        )
    if "pad_token" not in options and "<pad>" not in known:
        options["pad_token"] = None


def _as_token(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return AddedToken(value["content"], **{k: value[k] for k in _FLAGS if k in value})


def _plain(token: Any) -> Any:
    return [_plain(item) for item in token] if isinstance(token, list) else token["content"]


def _as_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    if not isinstance(value, AddedToken):
        return value
    return {"content": value.content} | {flag: getattr(value, flag) for flag in _FLAGS}


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, empty if the file is not there."""
    return parse_json_object(path.read_bytes(), str(path)) if path.is_file() else {}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"
