# SPDX-License-Identifier: Apache-2.0
"""Run by a peer's interpreter: read a saved tokenizer with transformers and print what it makes of texts.

python tokenizer_peer.py FOLDER slow|fast BATTERY.json RESAVED
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer


def main(folder: str, kind: str, battery_file: str, resaved: str) -> None:
    battery = json.loads(Path(battery_file).read_text("utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=kind == "fast")
    texts = battery["texts"]
    result = {
        "single": [tokenizer(text)["input_ids"] for text in texts],
        "bare": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "pair": [tokenizer(*pair)["input_ids"] for pair in battery["pairs"]],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "length": len(tokenizer),
        "side": tokenizer.padding_side,
        "decoded": [
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in battery["ids"]
        ],
    }
    if kind == "fast":
        result["windows"] = [
            {key: encoding[key] for key in battery["window_keys"]}
            for given, options in battery["windows"]
            for encoding in [tokenizer(*given, **options)]
        ]
    tokenizer.save_pretrained(resaved)
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
