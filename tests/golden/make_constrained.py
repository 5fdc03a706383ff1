# SPDX-License-Identifier: Apache-2.0
"""Makes constrained.json: what constrained beam search finds in the reference, each row by itself.

In an environment with transformers==4.37.2: `python tests/golden/make_constrained.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Constraint, GenerationConfig, LogitsProcessor, OPTForCausalLM

HERE = Path(__file__).parent
CASE, PAD, WIDTHS = "pre_norm", 1, (3, 7, 5)
NEW_TOKENS, BEAMS = 10, 4


class InOrder(Constraint):
    """These tokens in this order, whatever stands between them: a caller's own constraint."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids, self.seqlen, self.count = token_ids, len(token_ids), 0

    def advance(self) -> int | None:
        return self.token_ids[self.count] if self.remaining() else None

    def does_advance(self, token_id: int) -> bool:
        return token_id == self.advance()

    def update(self, token_id: int) -> tuple[bool, bool, bool]:
        stepped = self.does_advance(token_id)
        self.count += stepped
        return stepped, not self.remaining(), False

    def reset(self) -> None:
        self.count = 0

    def remaining(self) -> int:
        return self.seqlen - self.count

    def copy(self, stateful: bool = False) -> InOrder:
        copied = InOrder(self.token_ids)
        copied.count = self.count if stateful else 0
        return copied


class Guide(LogitsProcessor):
    """The reference's guidance, whose own cache does not follow the beams, without a cache."""

    def __init__(self, model: OPTForCausalLM, scale: float, width: int) -> None:
        self.model, self.scale, self.width = model, scale, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids[:, self.width - 1 :]).logits[:, -1]
        unconditional = logits.log_softmax(-1)
        return self.scale * (scores.log_softmax(-1) - unconditional) + unconditional


def settings(prompt: list[int], likely: list[int]) -> dict[str, dict[str, Any]]:
    """Options by name; `in_order` stands for a constraint of the class above.

    Args:
        prompt: one of the prompts.
        likely: tokens that come without constraints.
    """
    eos = {"eos_token_id": likely[:1]}
    forms = [[40, 41, 42], [40, 41, 43], [40, 44], likely[1:3]]
    return {
        "word": {"force_words_ids": [[20, 21, 22]]},
        "words": {"force_words_ids": [[20, 21], [30]], "num_return_sequences": 3},
        "same_beginning": {"force_words_ids": [[20, 21], [20, 22, 23]], "num_return_sequences": 2},
        "forms": {"force_words_ids": [forms], "num_return_sequences": 4},
        "likely_forms": {
            "force_words_ids": [[likely[1:3], [likely[1], 50], [likely[1], 51, 52]], [53]],
            "num_return_sequences": 4,
        },
        "eos": {**eos, "force_words_ids": [[20, 21]], "num_return_sequences": 2},
        "several_eos": {
            "eos_token_id": [likely[0], likely[3]],
            "force_words_ids": [[30], [[31, 32], [33]]],
            "early_stopping": True,
        },
        "ends": {"eos_token_id": [5, 68], "force_words_ids": [[102]], "early_stopping": True},
        "end": {"eos_token_id": [5], "force_words_ids": [[102]], "num_return_sequences": 3},
        "never": {
            **eos,
            "force_words_ids": [[30, 31]],
            "early_stopping": "never",
            "length_penalty": 0.5,
        },
        "short": {**eos, "force_words_ids": [[30]], "length_penalty": -1.0},
        "in_prompt": {**eos, "force_words_ids": [prompt[:2], [30, 31]]},
        "tight": {"force_words_ids": [[20, 21, 22, 23], [30, 31, 32], [[33, 34, 35]]]},
        "many": {"force_words_ids": [[20], [21], [22], [23], [24]], "num_return_sequences": 4},
        "unlikely": {
            "force_words_ids": [[20, 21, 22], [23, 24, 25], [26, 27]],
            "num_return_sequences": 4,
            "length_penalty": 0.0,
        },
        "own": {**eos, "in_order": [20, 21, 30], "num_return_sequences": 2},
        "own_and_word": {"in_order": [20, 21], "force_words_ids": [[30, 31]]},
        "processors": {
            **eos,
            "force_words_ids": [[20, 21], [22]],
            "repetition_penalty": 1.4,
            "no_repeat_ngram_size": 2,
            "min_new_tokens": 6,
            "suppress_tokens": [30, 31],
        },
        "guided": {"force_words_ids": [[20, 21]], "guidance_scale": 1.6},
    }


def found(model: OPTForCausalLM, prompt: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """New tokens, and scores and beam indices where the reference can tell them."""
    options = {"num_beams": BEAMS, "max_new_tokens": NEW_TOKENS, "pad_token_id": PAD, **options}
    own, scale = options.pop("in_order", None), options.pop("guidance_scale", None)
    processors = [] if scale is None else [Guide(model, scale, len(prompt))]
    config = GenerationConfig(bos_token_id=2, return_dict_in_generate=True, **options)
    config.constraints = None if own is None else [InOrder(own)]
    ids = torch.tensor([prompt])
    config.output_scores = True
    try:
        result = model.generate(ids, generation_config=config, logits_processor=processors)
    except (TypeError, RuntimeError):  # it has no indices of sequences that break constraints
        config.output_scores = False
        if own is not None:
            config.constraints = [InOrder(own)]
        result = model.generate(ids, generation_config=config, logits_processor=processors)
    row: dict[str, Any] = {"tokens": result.sequences[:, len(prompt) :].tolist()}
    if config.output_scores:
        count = len(row["tokens"][0])
        row["scores"] = [round(score, 5) for score in result.sequences_scores.tolist()]
        if result.beam_indices is not None:
            row["beam_indices"] = result.beam_indices[:, :count].tolist()
    return row


def main() -> None:
    torch.set_num_threads(1)
    model = OPTForCausalLM.from_pretrained(HERE / "cases" / CASE).eval()
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, 100, width).tolist() for width in WIDTHS]
    plain = {"max_new_tokens": 8, "eos_token_id": None, "repetition_penalty": 1.5}
    free = model.generate(torch.tensor(prompts[:1]), **plain)
    likely = list(dict.fromkeys(free[0, WIDTHS[0] :].tolist()))
    record = {"case": CASE, "prompts": prompts, "settings": {}}
    for name, options in settings(prompts[0], likely).items():
        rows = [found(model, prompt, options) for prompt in prompts]
        record["settings"][name] = {"options": options, "rows": rows}
    text = json.dumps(record).replace('{"options"', '\n{"options"')
    (HERE / "constrained.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
