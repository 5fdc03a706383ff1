# SPDX-License-Identifier: Apache-2.0
"""keras-hub on any of its backends: `python kh.py CHECKPOINT`, the backend by KERAS_BACKEND.

keras-hub reads no transformers files for OPT, so the weights are put into its layers here.
"""

from __future__ import annotations

import json
from pathlib import Path

import keras
import numpy as np
from keras_hub.models import OPTBackbone, OPTCausalLM
from serving import Decoder, Tokens, serve

#: Rows at the start of the checkpoint's position table that no token uses.
OFFSET = 2
#: keras-hub's name of a layer's part -> the checkpoint's.
DENSE = {
    "_self_attention_layer._query_dense": "self_attn.q_proj",
    "_self_attention_layer._key_dense": "self_attn.k_proj",
    "_self_attention_layer._value_dense": "self_attn.v_proj",
    "_self_attention_layer._output_dense": "self_attn.out_proj",
    "_feedforward_intermediate_dense": "fc1",
    "_feedforward_output_dense": "fc2",
}
NORMS = {
    "_self_attention_layer_norm": "self_attn_layer_norm",
    "_feedforward_layer_norm": "final_layer_norm",
}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a file: eight bytes of length, a header in JSON, then the numbers."""
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    return {
        name: data[start + info["data_offsets"][0] : start + info["data_offsets"][1]]
        .view("<f4")
        .reshape(info["shape"])
        for name, info in header.items()
    }


def part(layer: keras.layers.Layer, path: str) -> keras.layers.Layer:
    """A part of a layer by its dotted name."""
    for name in path.split("."):
        layer = getattr(layer, name)
    return layer


class KerasHub(Decoder):
    """The greedy sampler; `generate` compiles itself where the backend does so."""

    modules = ("keras_hub", "keras")

    def __init__(self, checkpoint: str) -> None:
        config = json.loads((Path(checkpoint) / "config.json").read_text())
        backbone = OPTBackbone(
            vocabulary_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            hidden_dim=config["hidden_size"],
            intermediate_dim=config["ffn_dim"],
            dropout=0.0,
            max_sequence_length=config["max_position_embeddings"],
        )
        assign(backbone, read_safetensors(Path(checkpoint) / "model.safetensors"))
        self.model = OPTCausalLM(backbone=backbone, preprocessor=None)
        self.model.compile(sampler="greedy")
        self.modules = (*self.modules, keras.config.backend())

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        ids = np.asarray(prompts, np.int32)
        room = np.zeros((len(prompts), new_tokens), np.int32)
        inputs = {
            "token_ids": np.concatenate([ids, room], axis=1),
            "padding_mask": np.concatenate([np.ones_like(ids), room], axis=1),
        }
        out = self.model.generate(inputs, stop_token_ids=None)
        return np.asarray(out["token_ids"])[:, ids.shape[1] :].tolist()


def assign(backbone: OPTBackbone, tensors: dict[str, np.ndarray]) -> None:
    """Puts the checkpoint's tensors into keras-hub's variables."""
    prefix = "model.decoder."
    backbone.token_embedding.embeddings.assign(tensors[prefix + "embed_tokens.weight"])
    positions = backbone.embeddings.position_embedding.position_embeddings
    positions.assign(tensors[prefix + "embed_positions.weight"][OFFSET:])
    for index, layer in enumerate(backbone.transformer_layers):
        name = f"{prefix}layers.{index}."
        for path, ours in DENSE.items():
            dense = part(layer, path)
            kernel = tensors[name + ours + ".weight"].T
            dense.kernel.assign(kernel.reshape(dense.kernel.shape))
            dense.bias.assign(tensors[name + ours + ".bias"].reshape(dense.bias.shape))
        for path, ours in NORMS.items():
            assign_norm(part(layer, path), tensors, name + ours)
    assign_norm(backbone.layer_norm, tensors, prefix + "final_layer_norm")


def assign_norm(layer: keras.layers.Layer, tensors: dict[str, np.ndarray], name: str) -> None:
    layer.gamma.assign(tensors[name + ".weight"])
    layer.beta.assign(tensors[name + ".bias"])


if __name__ == "__main__":
    serve(KerasHub)
