# SPDX-License-Identifier: Apache-2.0
"""The configuration of a metaseq model, which lies in no file of its own.

Sizes are read off the tensors' shapes; what shapes do not tell (the number of heads, the activation)
off the training run's settings, else off the published model of the same sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_core.checkpoints.tensors import LazyTensor
from opt_core.checkpoints.torch_objects import Inert
from opt_core.config import CONFIG_NAME, OPTConfig
from opt_core.errors import CheckpointError, ConfigError
from opt_core.metaseq.parts import spelt_table
from opt_core.params import AXES, POSITION_OFFSET, Kind, ParamSpec
from opt_core.presets import PRESETS

Settings = Mapping[str, Any]

_LAYER = re.compile(r"\blayers\.(\d+)\.")

#: metaseq's names of settings that shapes do not tell -> the configuration's fields.
SETTINGS = {
    "decoder_attention_heads": "num_attention_heads",
    "activation_fn": "activation_function",
    "decoder_normalize_before": "do_layer_norm_before",
}


def config_beside(folder: Path) -> OPTConfig | None:
    """Return what the config.json of a folder says; None if there is none."""
    file = folder / CONFIG_NAME
    return OPTConfig.from_json_file(file) if file.is_file() else None


def read_settings(value: Any) -> Settings:
    """Return the settings of the training run that `cfg` (or, in older files, `args`) holds."""
    found: dict[str, Any] = {}
    for run in (_lookup(_lookup(value, "cfg"), "model"), _lookup(value, "args")):
        for theirs, ours in SETTINGS.items():
            setting = _lookup(run, theirs)
            if isinstance(setting, (str, int)):
                found.setdefault(ours, setting)
    return found


def _lookup(holder: Any, name: str) -> Any:
    """Return an entry of a dictionary, an argparse.Namespace or an OmegaConf node; None without."""
    if isinstance(holder, Inert):
        holder = holder.state
    if isinstance(holder, dict) and isinstance(holder.get("_content"), dict):
        holder = holder["_content"]
    entry = holder.get(name) if isinstance(holder, dict) else None
    if isinstance(entry, Inert) and isinstance(entry.state, dict) and "_val" in entry.state:
        return entry.state["_val"]
    return entry


def infer_config(tensors: Mapping[str, LazyTensor], settings: Settings) -> OPTConfig:
    """Return the configuration of the model that the tensors make up.

    Raises ConfigError if neither the settings nor a published model say what shapes do not, and
    CheckpointError if the tensors are not those of OPT.
    """
    sizes = _sizes(tensors)
    preset = next((p for p in map(OPTConfig.preset, PRESETS) if _agrees(p, sizes)), None)
    known = dict(settings)
    has_final_norm = any(
        spec.kind is Kind.NORM_SCALE and not spec.is_per_layer for spec in _present(tensors)
    )
    if has_final_norm:
        known["do_layer_norm_before"] = True
    if preset is not None:
        for field in SETTINGS.values():
            known.setdefault(field, preset.get(field))
    for field in ("num_attention_heads", "do_layer_norm_before"):
        if field not in known:
            theirs = next(theirs for theirs, ours in SETTINGS.items() if ours == field)
            file = next(iter(tensors.values())).info.file
            raise ConfigError(
                f"{file}: expected the checkpoint to say {field} ({theirs} in its cfg or args), "
                f"found nothing, and no published model has its sizes {sizes}. Put a config.json "
                "beside it."
            )
    no_final_norm = known["do_layer_norm_before"] is True and not has_final_norm
    affine = sizes["layer_norm_elementwise_affine"]
    return OPTConfig(
        **sizes,
        **known,
        _remove_final_layer_norm=bool(no_final_norm and affine),
        torch_dtype=str(next(iter(tensors.values())).dtype),
    )


def _sizes(tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """Return the fields that follow from shapes and from which tensors there are."""
    present = _present(tensors)
    axes: dict[str, int] = {}
    for spec, shape in present.items():
        for axis, length in zip(spec.axes, shape, strict=False):
            axes.setdefault(axis, length)
    for axis in ("vocab", "word_embed", "position", "embed", "ffn"):
        if axis not in axes:
            file = next((tensor.info.file for tensor in tensors.values()), "the checkpoint")
            raise CheckpointError(
                f"{file}: expected a model of OPT, found no tensor that tells its "
                f"{AXES[axis].origin} among {str(list(tensors)[:5])[:200]}. Is it a checkpoint of "
                "another model?"
            )
    layers = {match[1] for name in tensors if (match := _LAYER.search(name))}
    norms = [spec for spec in present if spec.kind is Kind.NORM_SCALE]
    return {
        "vocab_size": axes["vocab"],
        "word_embed_proj_dim": axes["word_embed"],
        "max_position_embeddings": axes["position"] - POSITION_OFFSET,
        "hidden_size": axes["embed"],
        "num_hidden_layers": len(layers),
        "ffn_dim": axes["ffn"],
        "enable_bias": any(spec.kind is Kind.BIAS for spec in present),
        "layer_norm_elementwise_affine": bool(norms),
    }


def _present(tensors: Mapping[str, LazyTensor]) -> dict[ParamSpec, tuple[int, ...]]:
    """Return the rows of the table that the checkpoint has, in layer 0, and their shapes."""
    found: dict[ParamSpec, tuple[int, ...]] = {}
    for name, spec in spelt_table().items():
        if name in tensors:
            found[spec] = tensors[name].shape
    return found


def _agrees(preset: OPTConfig, sizes: Mapping[str, Any]) -> bool:
    """Whether a published model has these sizes; its vocabulary may have been extended."""
    fields = ("num_hidden_layers", "hidden_size", "word_embed_proj_dim", "ffn_dim")
    return all(preset.get(field) == sizes[field] for field in fields)
