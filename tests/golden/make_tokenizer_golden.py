# SPDX-License-Identifier: Apache-2.0
"""Record what the slow GPT2Tokenizer of transformers 4.37.2 makes of a battery of texts.

    python tests/golden/make_tokenizer_golden.py        (an environment with transformers==4.37.2)

Writes tests/golden/tokenizer/: a small byte-level vocabulary in the files that the hub carries for OPT
(vocab.json, merges.txt, special_tokens_map.json, tokenizer_config.json), and cases.json: a list of
tokenizer settings, each with calls, encodes, decodes and their results.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

FOLDER = Path(__file__).parent / "tokenizer"

CORPUS = [
    "The quick brown fox doesn't jump over the lazy dog; it's 10 o'clock and they're asleep.",
    "We've seen 1234 foxes, 56 dogs and (perhaps) one hen. I'll tell you: she'd say she isn't one!",
    "A model reads the prompt, and then it writes one token after another until it has no more to say.",
    "  indented\n\n\tlines   with    many spaces\r\nand ends\n",
    "Ein Fußgänger über die Brücke, déjà vu, naïve façade, Ελληνικά, русский, 日本語, 😀😀",
]

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n  \n",
    "\t tab",
    "The quick brown fox",
    " The quick brown fox ",
    "don't we'll they've I'm she'd it's they're DON'T",
    "spaces   before   words   ",
    "line one\nline two\r\n  line three",
    "numbers 1234567890 and 3.14, 1,000",
    "é à ü ß naïve façade",
    "e\u0301 combining",
    "😀 👩‍👩‍👧 flags 🇩🇪",
    "日本語 русский Ελληνικά",
    "control \x00 \x7f \x85 \xa0 \u2028 \ufeff",
    "</s>",
    "</s></s>",
    "a</s>b",
    "a </s> b",
    "<pad>",
    "x <pad> y<pad>",
    "<s> <unk> <mask>",
    "</s",
    "< /s>",
    "<<pad>>",
    "Hello , world . Is it n't ' so ' ? Yes ! I 'm , we 've",
    "the the the",
]

PAIRS = [
    ("The quick brown fox", "over the lazy dog"),
    ("", "one"),
    ("one", ""),
    ("", ""),
    ("a</s>", "<pad>b"),
    ("one", "it writes one token after another until it has no more to say"),
    ("it writes one token after another until it has no more to say", "one"),
]

CALLS: list[tuple[Any, dict[str, Any]]] = [
    *((text, {}) for text in TEXTS),
    *((text, {"add_special_tokens": False}) for text in TEXTS),
    *((pair, {"return_special_tokens_mask": True}) for pair in PAIRS),
    *((pair, {"add_special_tokens": False}) for pair in PAIRS),
    (TEXTS, {"padding": True, "return_special_tokens_mask": True}),
    (TEXTS[6:9], {"padding": "longest", "pad_to_multiple_of": 8}),
    (TEXTS[5:9], {"padding": "max_length", "max_length": 40}),
    (TEXTS[5:9], {"padding": "max_length", "max_length": 9, "pad_to_multiple_of": 8}),
    (PAIRS, {"padding": True, "return_special_tokens_mask": True}),
    (TEXTS[6:15], {"truncation": True, "max_length": 6}),
    (TEXTS[6:15], {"max_length": 6}),
    (TEXTS[6:15], {"truncation": True, "max_length": 6, "add_special_tokens": False}),
    (TEXTS[5:15], {"truncation": True, "max_length": 8, "padding": "max_length"}),
    (TEXTS[5:15], {"truncation": "only_first", "max_length": 5, "padding": True}),
    *((PAIRS[5:], {"truncation": True, "max_length": size}) for size in (4, 5, 9, 12, 15)),
    ([PAIRS[0]], {"truncation": "longest_first", "max_length": 7}),
    ([PAIRS[0]], {"truncation": "longest_first", "max_length": 8}),
    ([PAIRS[6]], {"truncation": "only_first", "max_length": 10}),
    ([PAIRS[5]], {"truncation": "only_second", "max_length": 10}),
    (["one"], {"padding": True, "return_attention_mask": False}),
]

SETTINGS: list[dict[str, Any]] = [
    {},
    {"padding_side": "left"},
    {"truncation_side": "left"},
    {"padding_side": "left", "truncation_side": "left", "model_max_length": 7},
    {"add_bos_token": False},
    {"add_prefix_space": True},
    {"additional_special_tokens": ["<sep>", "quick"], "add_tokens": ["fox", "<new>", "o"]},
]

EXTRA_TEXTS = [
    "The quick brown fox",
    "a<sep>b <new> c",
    "fo fox foxes of <new><new>",
    "quick  quick",
]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    train_vocabulary()
    incomplete = json.loads((FOLDER / "vocab.json").read_text("utf-8"))
    cases = [record(dict(settings)) for settings in SETTINGS]
    result = {
        "versions": {
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "texts": TEXTS,
        "tokens_of_texts": [load({}).tokenize(text) for text in TEXTS],
        "unknown_bytes": record_unknown(incomplete),
        "cases": cases,
    }
    text = json.dumps(result, ensure_ascii=True, separators=(",", ":"))
    (FOLDER / "cases.json").write_text(text.replace('{"settings"', '\n{"settings"') + "\n", "utf-8")


def train_vocabulary() -> None:
    """Write the four files in which the hub carries OPT's tokenizer, with 512 tokens."""
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        show_progress=False,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.train_from_iterator(CORPUS, trainer)
    engine.model.save(str(FOLDER))
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    end = {"content": "</s>", **token}
    special = {"bos_token": end, "eos_token": end, "pad_token": "<pad>", "unk_token": end}
    config = {
        "add_bos_token": True,
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken", **end},
        "eos_token": {"__type": "AddedToken", **end},
        "errors": "replace",
        "model_max_length": int(1e30),
        "pad_token": "<pad>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": {"__type": "AddedToken", **end},
    }
    for name, value in (("special_tokens_map", special), ("tokenizer_config", config)):
        (FOLDER / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def load(settings: dict[str, Any], folder: Path = FOLDER) -> transformers.GPT2Tokenizer:
    new = settings.pop("add_tokens", [])
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(folder, **settings)
    tokenizer.add_tokens(new)
    return tokenizer


def record(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs of one tokenizer for the whole battery."""
    tokenizer = load(dict(settings))
    calls = [*CALLS, *((text, {}) for text in EXTRA_TEXTS)]
    if settings.get("model_max_length"):
        calls = [
            (TEXTS[5:15], {"truncation": True}),
            (TEXTS[5:15], {"truncation": True, "padding": "max_length"}),
            (PAIRS[5:], {"truncation": True}),
        ]
    return {
        "settings": settings,
        "length": len(tokenizer),
        "special_ids": tokenizer.all_special_ids,
        "calls": [[given, options, call(tokenizer, given, options)] for given, options in calls],
        "decodes": decodes(tokenizer) if not settings or "add_tokens" in settings else [],
    }


def call(tokenizer: transformers.GPT2Tokenizer, given: Any, options: dict[str, Any]) -> Any:
    if isinstance(given, tuple):
        return dict(tokenizer(*given, **options))
    return dict(tokenizer(given, **options))


def decodes(tokenizer: transformers.GPT2Tokenizer) -> list[Any]:
    """Return [ids, skip_special_tokens, clean_up, text] for whole rows and for cuts through characters."""
    rows = [tokenizer(text)["input_ids"] for text in (*TEXTS, *EXTRA_TEXTS)]
    rows += [row[1:-1] for row in rows[12:17]] + [
        [2, 5, 1, 1],
        [0, 3, 2],
        list(range(len(tokenizer))),
    ]
    return [
        [
            row,
            skip,
            clean,
            tokenizer.decode(row, skip_special_tokens=skip, clean_up_tokenization_spaces=clean),
        ]
        for row in rows
        for skip, clean in ((False, None), (True, None), (True, False))
    ]


def record_unknown(vocab: dict[str, int]) -> dict[str, Any]:
    """Return what happens to bytes that a vocabulary lacks: here Q and Z."""
    for token in ("Q", "Z"):
        del vocab[token]
    vocab = {token: index for index, token in enumerate(sorted(vocab, key=vocab.__getitem__))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
        for file in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
            (folder / file).write_text((FOLDER / file).read_text("utf-8"), "utf-8")
        tokenizer = load({}, folder)
        texts = ["Quick", "QZ fox Q", "Zebra ZZ"]
        return {"removed": ["Q", "Z"], "calls": [[t, tokenizer(t)["input_ids"]] for t in texts]}


if __name__ == "__main__":
    main()
