# SPDX-License-Identifier: Apache-2.0
"""How a call of a model is carried out: the third decision, beside the parameters and the decoding.

From what the kernel of attention offers, what was asked for, and what is known before anything is
computed comes one `CallPlan`; a backend's decoder executes it and decides nothing more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from opt_core.config import OPTConfig

EAGER, FUSED = "eager", "sdpa"  # what other kernels fall back to


@dataclass(frozen=True)
class Kernel:
    """A kernel of attention, and what it offers; a backend's `KERNELS` holds one for each name.

    Attributes:
        function: computes it.
        shows_weights: whether it returns the attention weights.
        masks_heads: whether it takes a head mask.
        drops: whether it has dropout.
        is_causal: whether it can hide the keys to come by itself, without a bias.
        packs: whether it takes no bias at all, but is told where the real tokens are; only where
            lengths are known.
        can_pack: whether it can do so with that dropout.
    """

    function: Callable[..., Any]
    shows_weights: bool = False
    masks_heads: bool = False
    drops: bool = False
    is_causal: bool = False
    packs: bool = False
    can_pack: Callable[[float], bool] = lambda dropout: True


class BiasKind(Enum):
    """What hides keys from queries."""

    NONE = "none"  # every query sees every key
    CAUSAL = "causal"  # the kernel hides the keys to come by itself
    FULL = "full"  # a bias is added to the scores
    PACKED = "packed"  # the kernel is told where the real tokens are


@dataclass(frozen=True)
class Asked:
    """What the caller asked for; None asks for what the configuration says."""

    use_cache: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    return_dict: bool | None = None


@dataclass(frozen=True)
class Facts:
    """What is known of a call before anything is computed.

    Attributes:
        length: of the queries; None while it is traced.
        has_past: whether there are past tokens.
        has_room: whether the keys are all columns of a fixed cache, those not in use too.
        hides: whether a mask hides tokens.
        has_texts: whether rows hold several texts.
        masks_heads: whether heads are masked.
        trains: whether dropout is active.
        recomputes: whether layers are computed again for their gradients.
        keeps_cache: whether a cache is kept unless the caller says; None for what the configuration says.
    """

    length: int | None
    has_past: bool = False
    has_room: bool = False
    hides: bool = False
    has_texts: bool = False
    masks_heads: bool = False
    trains: bool = False
    recomputes: bool = False
    keeps_cache: bool | None = None


@dataclass(frozen=True)
class CallPlan:
    """How a call is carried out.

    Attributes:
        is_causal: whether the kernel hides the keys to come by itself.
        remarks: what the caller should be told once, by subject.
    """

    kernel: Kernel
    bias: BiasKind
    is_causal: bool
    use_cache: bool
    output_attentions: bool
    output_hidden_states: bool
    return_dict: bool
    recomputes: bool
    remarks: tuple[tuple[str, str], ...] = ()


def plan_call(
    config: OPTConfig, kernels: Mapping[str, Kernel], name: str, asked: Asked, facts: Facts
) -> CallPlan:
    """Decides how a call is carried out.

    Args:
        config: the model's configuration.
        kernels: the backend's.
        name: of the kernel that the model was made with.
        asked: what the caller asked for.
        facts: what is known before anything is computed.
    """
    shows = _given(asked.output_attentions, config.output_attentions)
    dropout = config.attention_dropout if facts.trains else 0.0
    used, remarks = _usable(kernels, name, shows, dropout, facts)
    if facts.recomputes and asked.use_cache:
        remarks += (("use_cache", _NO_CACHE),)
    kernel = kernels[used]
    bias = _bias(kernel, facts)
    return CallPlan(
        kernel=kernel,
        bias=bias,
        is_causal=bias is BiasKind.CAUSAL or (kernel.packs and facts.length != 1),
        use_cache=not facts.recomputes
        and _given(asked.use_cache, _given(facts.keeps_cache, config.use_cache)),
        output_attentions=shows,
        output_hidden_states=_given(asked.output_hidden_states, config.output_hidden_states),
        return_dict=_given(asked.return_dict, config.return_dict),
        recomputes=facts.recomputes,
        remarks=remarks,
    )


def _given(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _usable(
    kernels: Mapping[str, Kernel], name: str, shows: bool, dropout: float, facts: Facts
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The name of the kernel that can do what is asked, and a remark if it is another one."""
    kernel = kernels[name]
    wanted = {
        "shows attention weights": (kernel.shows_weights, shows),
        "masks heads": (kernel.masks_heads, facts.masks_heads),
        "has dropout": (kernel.drops, dropout > 0),
    }
    if any(needed and not offered for offered, needed in wanted.values()):
        lacks = [what for what, (offered, _) in wanted.items() if not offered]
        return EAGER, ((name, _RUNS_EAGER.format(name=name, lacks=" nor ".join(lacks))),)
    if not kernel.packs:
        return name, ()
    if facts.has_room:  # a compiled program packs nothing
        return FUSED, ()
    if (facts.hides or facts.has_texts) and not kernel.can_pack(dropout):
        return FUSED, (("packing", _RUNS_FUSED),)
    return name, ()


def _bias(kernel: Kernel, facts: Facts) -> BiasKind:
    """As little as hides what has to be hidden."""
    if kernel.packs:
        return BiasKind.PACKED
    if not (facts.hides or facts.has_texts or facts.has_room):
        if facts.length == 1:
            return BiasKind.NONE
        if not facts.has_past and kernel.is_causal:
            return BiasKind.CAUSAL
    return BiasKind.FULL


_NO_CACHE = (
    "Gradient checkpointing keeps no keys and values in training: use_cache=True has no effect there "
    "(said once)."
)
_RUNS_EAGER = (
    "attn_implementation={name!r} neither {lacks}: such calls run 'eager' instead (said once)."
)
_RUNS_FUSED = (
    "PyTorch's FlashAttention-2 has no dropout for rows with pads or several texts (or is older than "
    "2.10): such calls run 'sdpa' instead (said once). The flash_attn package has it."
)
_told: set[str] = set()


def tell_once(plan: CallPlan) -> None:
    """Warns of a plan's remarks, each subject once in a process."""
    for subject, message in plan.remarks:
        if subject not in _told:
            _told.add(subject)
            warnings.warn(message, stacklevel=2)
