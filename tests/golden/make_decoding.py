# SPDX-License-Identifier: Apache-2.0
"""Write decoding/*.npz: what transformers 4.37.2 generates with its strategies and options.

Run it in an environment with transformers==4.37.2, as make_golden.py, whose checkpoints it uses. Each
row runs alone: a row in a padded batch must give the same. Prompts are drawn until the tokens stay
the same in models whose weights differ by 1e-4 of themselves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from decoding_settings import SETTINGS, Free, Setting
from golden_generation import PAD, Arrays
from make_golden import build
from transformers import GenerationConfig, OPTForCausalLM

MODELS = ("pre_norm", "post_norm")
LENGTHS, NEW_TOKENS, NEGATIVE_LENGTH, BOS = (3, 7, 5), 10, 3, 2
SCORED_STEPS = 2
ATTEMPTS, SHIFT, SHIFTED_MODELS = 60, 1e-4, 2


def shifted(model: OPTForCausalLM, seed: int) -> OPTForCausalLM:
    """A model whose weights differ a little."""
    generator = torch.Generator().manual_seed(seed)
    other = OPTForCausalLM(model.config).eval()
    other.load_state_dict(model.state_dict())
    for parameter in other.parameters():
        parameter.mul_(1 + SHIFT * torch.randn(parameter.shape, generator=generator))
    return other


def same_parity(batch_id: int, tokens: torch.Tensor) -> list[int]:
    """The tokens that are even where the last one is, and odd where it is odd."""
    return list(range(int(tokens[-1]) % 2, 99, 2))


def generate(
    model: OPTForCausalLM, row: np.ndarray, setting: Setting, options: dict[str, Any], **extra: Any
) -> dict[str, Any]:
    """The output for one prompt, with `new`: its new tokens [R, any]."""
    plan = GenerationConfig(
        max_new_tokens=NEW_TOKENS, bos_token_id=BOS, pad_token_id=PAD, **setting.strategy, **options
    )
    plan.return_dict_in_generate = plan.output_scores = True
    if "sequence_bias" in options:  # a dict, which JSON cannot hold
        plan.sequence_bias = {tuple(ids): bias for ids, bias in options["sequence_bias"]}
    result = model.generate(torch.from_numpy(row), generation_config=plan, **extra)
    return {**result, "new": result.sequences[:, row.shape[1] :].numpy()}


def extras(setting: Setting, negative: np.ndarray) -> dict[str, Any]:
    """Arguments of generate that are no options."""
    found: dict[str, Any] = {}
    if setting.prefix:
        found["prefix_allowed_tokens_fn"] = same_parity
    if setting.negative:
        found["negative_prompt_ids"] = torch.from_numpy(negative)
    return found


def ends_for(rows: list[list[int]]) -> list[int]:
    """Two tokens of which the first ends one row in mid-row, and not the others at the same step."""
    places = {t: [r.index(t) if t in r else NEW_TOKENS for r in rows] for row in rows for t in row}
    good = [t for t, at in places.items() if 2 <= min(at) <= 6 and len(set(at)) > 1 and t != PAD]
    return good[:1] + [t for t in places if t not in good[:1] and min(places[t]) >= 3][:1]


def attempt(
    models: list[OPTForCausalLM], setting: Setting, rng: np.random.Generator
) -> tuple[Arrays, dict[str, Any]] | None:
    """One setting with one drawing of prompts; None where its tokens are not well determined."""
    vocab = models[0].config.vocab_size
    rows = [rng.integers(3, vocab, (1, length)) for length in LENGTHS]
    if setting.prompts == "bos":
        rows = [np.array([[BOS]])]
    negatives = [rng.integers(3, vocab, (1, NEGATIVE_LENGTH)) for _ in rows]
    endless = [generate(models[0], row, setting, {"eos_token_id": None})["new"] for row in rows]
    new = [found[0].tolist() for found in endless]
    free = Free(new, ends_for(new), int(rng.integers(3, vocab)))
    if len(free.eos) < 2 and setting.prompts == "rows":
        return None
    options = {"eos_token_id": None, **setting.options(free)}
    asked = {key: value for key, value in options.items() if value is not None}
    found: list[dict[str, Any]] = []
    for row, negative in zip(rows, negatives, strict=True):
        extra = extras(setting, negative)
        first, *others = (generate(model, row, setting, asked, **extra) for model in models)
        if any(not np.array_equal(first["new"], other["new"]) for other in others):
            return None
        found.append(first)
    differs = [not np.array_equal(a["new"], b) for a, b in zip(found, endless, strict=True)]
    if setting.acts and not any(differs):
        return None
    arrays = {f"prompt/{i}": row for i, row in enumerate(rows)}
    if setting.negative:
        arrays |= {f"negative/{i}": row for i, row in enumerate(negatives)}
    for i, output in enumerate(found):
        arrays |= {f"{name}/{i}": array for name, array in results(setting, output).items()}
    return arrays, {
        **setting.strategy,
        "max_new_tokens": NEW_TOKENS,
        "pad_token_id": PAD,
        **options,
    }


def results(setting: Setting, output: dict[str, Any]) -> Arrays:
    """What is kept of the output of a row."""
    arrays = {"new": output["new"].astype(np.int16)}
    if "sequences_scores" in output:
        arrays["sequences_scores"] = output["sequences_scores"].numpy()
        arrays["beam_indices"] = output["beam_indices"].numpy().astype(np.int16)
    if setting.scores:
        arrays["scores"] = torch.stack(output["scores"][:SCORED_STEPS]).numpy()  # [steps, R, V]
    return arrays


def record(name: str, path: Path) -> None:
    """All settings with one model."""
    model = build(name)
    models = [model, *(shifted(model, seed) for seed in range(SHIFTED_MODELS))]
    arrays: Arrays = {}
    for number, (key, setting) in enumerate(SETTINGS.items()):
        for trial in range(ATTEMPTS):
            found = attempt(models, setting, np.random.default_rng([number, trial]))
            if found is not None:
                break
        else:
            raise SystemExit(f"{name}, {key}: no prompts whose tokens are well determined")
        arrays |= {f"{key}/{part}": value for part, value in found[0].items()}
        rows = sum(part.startswith("prompt/") for part in found[0])
        facts = {"options": found[1], "prefix": setting.prefix, "rows": rows}
        arrays[f"{key}/facts"] = np.array(json.dumps(facts))
        print(name, key, f"attempt {trial + 1}")
    arrays["versions"] = np.array(f"transformers {transformers.__version__}, {torch.__version__}")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def main() -> None:
    """Write everything below --out (default: this folder)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    with torch.no_grad():
        for name in MODELS:
            record(name, out / "decoding" / f"{name}.npz")


if __name__ == "__main__":
    main()
