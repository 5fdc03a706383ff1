# SPDX-License-Identifier: Apache-2.0
"""Write two tiny OPT models in every file format of transformers 4.37.2, and the logits to expect.

Run it in an environment with transformers==4.37.2, TensorFlow and Flax (see README.md in this
folder for what is in which folder); it imports nothing of this project.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import torch
import transformers
from golden_generation import PAD, tensors
from make_golden import perturb
from transformers import (
    FlaxOPTForCausalLM,
    FlaxOPTModel,
    OPTConfig,
    OPTForCausalLM,
    TFOPTForCausalLM,
)

SHARD = "12KB"  # three or four shards
BASE: dict[str, Any] = {
    "vocab_size": 71,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "ffn_dim": 24,
    "max_position_embeddings": 16,
    "word_embed_proj_dim": 16,
}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "pre_norm": (101, {}),
    "post_norm": (102, {"do_layer_norm_before": False, "word_embed_proj_dim": 12}),
}


def build(name: str, **changes: Any) -> OPTForCausalLM:
    """The model of that name, every parameter perturbed."""
    seed, differences = MODELS[name]
    model = OPTForCausalLM(OPTConfig(**{**BASE, **differences, **changes})).eval()
    perturb(model, seed)
    return model


def write_torch(model: OPTForCausalLM, folder: Path) -> None:
    """The PyTorch formats: canonical safetensors and the kinds of pytorch_model.bin."""
    model.save_pretrained(folder / "safetensors")
    model.model.save_pretrained(folder / "safetensors_base")
    model.save_pretrained(folder / "safetensors_sharded", max_shard_size=SHARD)
    model.save_pretrained(folder / "bin", safe_serialization=False)
    model.save_pretrained(folder / "bin_sharded", safe_serialization=False, max_shard_size=SHARD)

    state = model.state_dict()
    model.config.save_pretrained(folder / "bin_legacy")
    torch.save(
        state,
        folder / "bin_legacy" / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    # As on the hub for the 6.7b, 13b and 30b sizes: names of the base model, no head, float16.
    hub = {key.removeprefix("model."): value.half() for key, value in state.items()}
    del hub["lm_head.weight"]
    write_bin(model.config, hub, folder / "bin_fp16_decoder", torch.float16)
    low = {key: value.bfloat16() for key, value in state.items()}
    write_bin(model.config, low, folder / "bin_bf16", torch.bfloat16)


def write_bin(
    config: OPTConfig, state: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """Write a state dict and a config that names its dtype."""
    copy = OPTConfig.from_dict({**config.to_dict(), "torch_dtype": dtype})
    copy.save_pretrained(folder)
    torch.save(state, folder / "pytorch_model.bin")


def write_tensorflow(source: Path, folder: Path) -> None:
    """The TensorFlow formats. With shards the reference writes h5 whatever it is asked for.

    A TFOPTModel writes the same names as a TFOPTForCausalLM, so it has no folder of its own.
    """
    model = TFOPTForCausalLM.from_pretrained(source)
    model.config._name_or_path = ""  # would be written: a path of this machine
    model.save_pretrained(folder / "tf_safetensors", safe_serialization=True)
    model.save_pretrained(folder / "h5")
    model.save_pretrained(folder / "h5_sharded", max_shard_size=SHARD)


def write_flax(source: Path, folder: Path) -> None:
    """The Flax formats. With shards the reference writes msgpack whatever it is asked for."""
    model = FlaxOPTForCausalLM.from_pretrained(source)
    model.save_pretrained(folder / "flax_safetensors", safe_serialization=True)
    model.save_pretrained(folder / "msgpack")
    model.save_pretrained(folder / "msgpack_sharded", max_shard_size=SHARD)
    base = FlaxOPTModel.from_pretrained(source)
    base.save_pretrained(folder / "flax_safetensors_base", safe_serialization=True)


def write_untied(name: str, folder: Path) -> OPTForCausalLM:
    """The same model with a head of its own (TensorFlow's OPT cannot have one)."""
    model = build(name, tie_word_embeddings=False)
    model.save_pretrained(folder / "safetensors_untied")
    flax = FlaxOPTForCausalLM.from_pretrained(folder / "safetensors_untied")
    flax.save_pretrained(folder / "flax_safetensors_untied", safe_serialization=True)
    flax.save_pretrained(folder / "msgpack_untied")
    return model


def expected(model: OPTForCausalLM, untied: OPTForCausalLM, seed: int) -> dict[str, np.ndarray]:
    """Logits, computed in float32, of the stored weights: as they are and rounded to 16 bits."""
    rng = np.random.default_rng([seed, 1])
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = np.where(mask == 1, rng.integers(3, model.config.vocab_size, mask.shape), PAD)
    inputs = {"input_ids": ids, "attention_mask": mask}
    arrays = {
        **inputs,
        "logits": model(**tensors(inputs)).logits.numpy(),
        "untied/logits": untied(**tensors(inputs)).logits.numpy(),
    }
    for dtype in (torch.float16, torch.bfloat16):
        rounded = OPTForCausalLM(model.config).eval()
        rounded.load_state_dict({k: v.to(dtype).float() for k, v in model.state_dict().items()})
        name = str(dtype).removeprefix("torch.")
        arrays[f"{name}/logits"] = rounded(**tensors(inputs)).logits.numpy()
    return arrays


def main() -> None:
    """Write both models below --out (default: this folder)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out / "formats"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for name, (seed, _) in MODELS.items():
        folder = out / name
        with torch.no_grad():
            model = build(name)
            write_torch(model, folder)
            untied = write_untied(name, folder)
            np.savez_compressed(folder / "expected.npz", **expected(model, untied, seed))
        write_tensorflow(folder / "safetensors", folder)
        write_flax(folder / "safetensors", folder)
        for extra in folder.glob("*/generation_config.json"):
            extra.unlink()
        print(name)


if __name__ == "__main__":
    main()
