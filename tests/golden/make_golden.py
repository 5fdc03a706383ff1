# SPDX-License-Identifier: Apache-2.0
"""Write the golden files: tiny OPT checkpoints and what transformers 4.37.2 computes with them.

Run it in an environment with transformers==4.37.2 (see README.md in this folder for the keys);
it imports nothing of this project. Weights and inputs come from numpy's PCG64 with fixed seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from golden_extras import record_activations
from golden_generation import BATCH, LENGTH, PAD, Arrays, generations, tensors
from golden_processors import record_processors
from transformers import OPTConfig, OPTForCausalLM

BASE: dict[str, Any] = {
    "vocab_size": 103,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 40,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 24,
}
# name -> (seed, what differs from BASE)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "pre_norm": (11, {"num_hidden_layers": 3}),
    "post_norm": (
        22,
        {
            "do_layer_norm_before": False,
            "hidden_size": 32,
            "word_embed_proj_dim": 20,
            "vocab_size": 99,
        },
    ),
    "no_bias": (3, {"enable_bias": False}),
    "no_affine": (14, {"layer_norm_elementwise_affine": False, "num_attention_heads": 2}),
    "no_final_norm": (25, {"_remove_final_layer_norm": True}),
    "untied_gelu": (
        26,
        {
            "tie_word_embeddings": False,
            "activation_function": "gelu",
            "hidden_size": 16,
            "word_embed_proj_dim": 28,
            "vocab_size": 119,
            "num_hidden_layers": 3,
        },
    ),
    "galactica": (
        7,
        {
            "activation_function": "gelu",
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "bos_token_id": 0,
            "vocab_size": 120,
        },
    ),
    "gelu_new_odd": (
        28,
        {
            "activation_function": "gelu_new",
            "hidden_size": 21,
            "word_embed_proj_dim": 21,
            "num_attention_heads": 3,
            "ffn_dim": 33,
        },
    ),
    "quick_gelu_post": (
        59,
        {
            "activation_function": "quick_gelu",
            "do_layer_norm_before": False,
            "tie_word_embeddings": False,
            "num_attention_heads": 3,
            "enable_bias": False,
        },
    ),
}
MASKS: dict[str, list[list[int]]] = {
    "left": [[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]],
    "mixed": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1, 0]],
}


def perturb(model: torch.nn.Module, seed: int) -> None:
    """Overwrite every parameter with seeded noise: norm scales 1 + N(0, .3), biases N(0, .3),
    position table N(0, 1), embeddings N(0, .5), other weights N(0, .2); no row is left out."""
    rng = np.random.default_rng([seed, 0])
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = rng.standard_normal(tuple(parameter.shape))
            if "layer_norm.weight" in name:
                value = 1.0 + 0.3 * noise
            elif name.endswith("bias"):
                value = 0.3 * noise
            elif "embed_positions" in name:
                value = noise
            else:
                value = (0.5 if "embed_tokens" in name else 0.2) * noise
            parameter.copy_(torch.from_numpy(value.astype(np.float32)))


def build(name: str) -> OPTForCausalLM:
    """The model of a case, in float32 and eval mode; dropout stays on in its config."""
    seed, changes = CASES[name]
    model = OPTForCausalLM(OPTConfig(**{**BASE, **changes})).eval()
    perturb(model, seed)
    return model


def flatten(output: dict[str, Any]) -> Arrays:
    """A model output as arrays: `logits`, `hidden_states/0`, `past_key_values/0/key`, ..."""
    arrays: Arrays = {}
    for key, value in output.items():
        if isinstance(value, torch.Tensor):
            arrays[key] = value.float().numpy()
        elif key == "past_key_values":
            for i, (k, v) in enumerate(value):  # each [B, N, S, H]
                arrays[f"{key}/{i}/key"], arrays[f"{key}/{i}/value"] = k.numpy(), v.numpy()
        else:
            arrays.update({f"{key}/{i}": tensor.numpy() for i, tensor in enumerate(value)})
    return arrays


def situation(model: OPTForCausalLM, inputs: Arrays, *keep: str, **options: bool) -> Arrays:
    """Inputs and outputs of one forward call, under their names in the call."""
    output = model(**tensors(inputs), **options)
    return {**inputs, **flatten({key: output[key] for key in keep})}


def labels_for(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Labels that ignore pads, every token after a pad (a pad would predict it), and token 4."""
    labels = np.where(mask == 1, ids, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100
    labels[:, 4] = -100
    return labels


def forward_situations(model: OPTForCausalLM, rng: np.random.Generator) -> dict[str, Arrays]:
    """Unpadded, padded, head mask and inputs_embeds calls."""
    config = model.config
    ids = rng.integers(3, config.vocab_size, (BATCH, LENGTH))
    masks = {"unpadded": np.ones_like(ids)} | {k: np.array(m) for k, m in MASKS.items()}
    everything = ("loss", "logits", "hidden_states", "attentions")
    found: dict[str, Arrays] = {}
    for name, mask in masks.items():
        inputs = {"input_ids": np.where(mask == 1, ids, PAD), "labels": labels_for(ids, mask)}
        keep: tuple[str, ...] = (*everything, "past_key_values")
        if name != "unpadded":
            inputs["attention_mask"], keep = mask, everything
        found[name] = situation(
            model, inputs, *keep, output_attentions=True, output_hidden_states=True
        )
        calls = {k: v for k, v in inputs.items() if k != "labels"}
        found[name]["base/last_hidden_state"] = model.model(
            **tensors(calls)
        ).last_hidden_state.numpy()

    heads = (config.num_hidden_layers, config.num_attention_heads)  # [L, N]
    head_mask = np.where(rng.random(heads) < 0.5, rng.integers(0, 2, heads), rng.random(heads))
    head_mask[:, 0] = rng.random(config.num_hidden_layers)
    inputs = {"input_ids": ids, "head_mask": head_mask.astype(np.float32)}
    found["head_mask"] = situation(model, inputs, "logits", "attentions", output_attentions=True)

    shape = (BATCH, LENGTH, config.word_embed_proj_dim)  # [B, T, E]
    embeds = 0.5 * rng.standard_normal(shape)
    inputs = {"inputs_embeds": embeds.astype(np.float32), "attention_mask": masks["left"]}
    found["inputs_embeds"] = situation(model, inputs, "logits")
    return found


def half_precision(model: OPTForCausalLM, found: dict[str, Arrays]) -> Arrays:
    """Logits of the same weights cast to 16 bits, stored as float32."""
    arrays: Arrays = {}
    for dtype in ("bfloat16", "float16"):
        cast = OPTForCausalLM(model.config).eval()
        cast.load_state_dict(model.state_dict())
        cast = cast.to(getattr(torch, dtype))
        for name in ("unpadded", "left"):
            keys = ("input_ids", "attention_mask")
            inputs = {k: found[name][k] for k in keys if k in found[name]}
            arrays[f"{name}/{dtype}/logits"] = cast(**tensors(inputs)).logits.float().numpy()
    return arrays


def cached_steps(model: OPTForCausalLM, rng: np.random.Generator) -> Arrays:
    """A left-padded prompt of 7, then 3 tokens at once, then 1, through past_key_values."""
    ids = rng.integers(3, model.config.vocab_size, (BATCH, LENGTH + 4))
    mask = np.concatenate([np.array(MASKS["left"]), np.ones((BATCH, 4), np.int64)], axis=1)
    ids, past, arrays = np.where(mask == 1, ids, PAD), None, {}
    for step, (start, stop) in enumerate([(0, LENGTH), (LENGTH, LENGTH + 3), (LENGTH + 3, None)]):
        inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        output = model(**tensors(inputs), past_key_values=past, use_cache=True)
        past = output.past_key_values
        inputs["logits"] = output.logits.numpy()
        arrays.update({f"cached/{step}/{key}": value for key, value in inputs.items()})
    return arrays


def tuple_outputs(model: OPTForCausalLM, arrays: Arrays) -> list[dict[str, Any]]:
    """Names, in order, of what each model returns as a tuple under each choice of options."""
    ids, labels = (torch.from_numpy(arrays[f"unpadded/{k}"]) for k in ("input_ids", "labels"))
    found = []
    for bits in range(16):
        flags = [bool(bits >> i & 1) for i in range(4)]
        options = dict(
            zip(("use_cache", "output_hidden_states", "output_attentions"), flags, strict=False)
        )
        which, extra = (model, {"labels": labels}) if flags[3] else (model.model, {})
        named = which(ids, **extra, **options, return_dict=True)
        plain = which(ids, **extra, **options, return_dict=False)
        if [type(value) for value in plain] != [type(value) for value in named.values()]:
            raise SystemExit("a tuple output is not the dict output without its names")
        entry = {"class": type(which).__name__, "labels": flags[3], **options}
        found.append({**entry, "length": len(plain), "names": list(named)})
    return found


def write_case(name: str, folder: Path) -> None:
    """Write config.json, model.safetensors, outputs.npz and case.json of one case."""
    seed, changes = CASES[name]
    rng = np.random.default_rng([seed, 2])
    model = build(name)
    model.save_pretrained(folder)
    found = forward_situations(model, rng)
    arrays = {f"{name}/{key}": v for name, part in found.items() for key, v in part.items()}
    arrays |= half_precision(model, found) | cached_steps(model, rng)
    tokens, report = generations(model, np.random.default_rng([seed, 1]))
    arrays |= tokens
    np.savez_compressed(folder / "outputs.npz", **arrays)
    facts = {
        "name": name,
        "seed": seed,
        "changes": changes,
        "versions": {lib.__name__: lib.__version__ for lib in (transformers, torch, np)},
        "inputs": f"ids uniform in [3, vocab_size), B={BATCH}, T={LENGTH}, pad id {PAD}",
        "generation": report,
        "tuples": tuple_outputs(model, arrays),
    }
    (folder / "case.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    """Write everything below --out (default: this folder)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    with torch.no_grad():
        for name in CASES:
            write_case(name, out / "cases" / name)
            print(name)
        record_activations(out / "activations.npz")
        record_processors(out / "processors.npz", build("pre_norm"))


if __name__ == "__main__":
    main()
