# SPDX-License-Identifier: Apache-2.0
"""The published sizes of OPT, by name."""

from __future__ import annotations

from typing import Any

from opt_core.errors import ConfigError

#: layers, hidden size, heads, word embedding size (metaseq `opt_job_constants.py`); ffn is 4 x hidden.
PUBLISHED = {
    "opt-125m": (12, 768, 12, 768),
    "opt-350m": (24, 1024, 16, 512),
    "opt-1.3b": (24, 2048, 32, 2048),
    "opt-2.7b": (32, 2560, 32, 2560),
    "opt-6.7b": (32, 4096, 32, 4096),
    "opt-13b": (40, 5120, 40, 5120),
    "opt-30b": (48, 7168, 56, 7168),
    "opt-66b": (64, 9216, 72, 9216),
    "opt-175b": (96, 12288, 96, 12288),
}
PRESETS = tuple(PUBLISHED)


def published_sizes(name: str) -> dict[str, Any]:
    """The arguments of `OPTConfig` in which a published size differs from the smallest.

    Raises:
        ConfigError: an unknown name.
    """
    name = name.removeprefix("facebook/")
    if name not in PUBLISHED:
        raise ConfigError(f"Unknown size {name!r}. The published ones: {', '.join(PRESETS)}.")
    layers, hidden, heads, embed = PUBLISHED[name]
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "word_embed_proj_dim": embed,
        "ffn_dim": 4 * hidden,
        "do_layer_norm_before": embed == hidden,  # only opt-350m normalises after
    }
