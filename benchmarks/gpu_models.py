# SPDX-License-Identifier: Apache-2.0
"""Models of random weights on a device: ours and transformers', on the same tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.random_checkpoint import DISTRIBUTIONS
from opt_core import OPTConfig
from opt_core.params import TIED_HEAD_NAME, param_table
from opt_torch import OPTForCausalLM

Weights = Mapping[str, nn.Parameter]

#: Of OPT's tokenizer.
PAD = 1


@torch.no_grad()
def random_weights(config: OPTConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """The parameters of an `OPTForCausalLM`, made where they stay; always the same for a device."""
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for param in param_table(config):
        mean, std = DISTRIBUTIONS[param.spec.kind]
        tensor = torch.empty(param.shape, dtype=dtype, device=device)
        weights[param.name] = nn.Parameter(tensor.normal_(mean, std, generator=generator))
    return weights


def ours(config: OPTConfig, weights: Weights, attention: str) -> OPTForCausalLM:
    """Our model over those very tensors, in evaluation mode."""
    with torch.device("meta"):
        model = OPTForCausalLM(config, attn_implementation=attention)
    return _filled(model, weights)


def theirs(config: OPTConfig, weights: Weights, attention: str) -> Any:
    """The model of transformers over those very tensors, in evaluation mode; it ends no text early.

    Raises:
        ImportError, ValueError and the like: what transformers says of a missing package or kernel.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # it looks for kernels there
    import transformers

    fields = {key: value for key, value in config.to_dict().items() if key != "architectures"}
    dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):
        model = transformers.OPTForCausalLM._from_config(
            transformers.OPTConfig(**fields), attn_implementation=attention, dtype=dtype
        )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return _filled(model, weights)


def _filled(model: Any, weights: Weights) -> Any:
    found = model.load_state_dict(weights, strict=False, assign=True)
    if {*found.missing_keys} - {TIED_HEAD_NAME} or found.unexpected_keys:
        raise ValueError(f"expected the parameters of {type(model).__name__}: {found}")
    model.tie_weights()
    return model.eval()


def first_attention(model: Any) -> nn.Module:
    """The attention of the first layer, of either."""
    return model.get_submodule("model.decoder.layers.0.self_attn")


def random_tokens(config: OPTConfig, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """[B, T], none special, the same for everyone."""
    rng = np.random.default_rng([batch, length])
    tokens = rng.integers(4, config.vocab_size, (batch, length))
    return torch.from_numpy(tokens).to(device)
