# SPDX-License-Identifier: Apache-2.0
"""OPT in float64 numpy: the executable specification that the three backends are measured against.

Read it from the bottom: `greedy` and `forward` say what a model does, the functions above them how.
Every intermediate lands in a `Trace` under its name, such as `layers/0/scores`; where the golden
files hold the same thing, the name is the same. It is written for the reader, not for speed: it
recomputes the whole row for every token, and never drops out.

B batch, T query positions, S key positions (= T here), N heads, H head size, D hidden, F ffn,
E word embedding, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Trace = dict[str, Array]
Weights = Mapping[str, Array]  # canonical names, such as model.decoder.embed_tokens.weight

POSITION_OFFSET = 2
LAYER_NORM_EPS = 1e-5
IGNORED_LABEL = -100


class Config(Protocol):
    """What is read of an OPTConfig."""

    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    word_embed_proj_dim: int
    activation_function: str
    do_layer_norm_before: bool
    _remove_final_layer_norm: bool
    enable_bias: bool
    layer_norm_elementwise_affine: bool
    tie_word_embeddings: bool


# --- activations, by the names of transformers 4.37.2 ---------------------------------------------


def erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def laplace(x: Array) -> Array:
    return 0.5 * (1.0 + erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_10": lambda x: np.clip(gelu(x), -10.0, 10.0),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "laplace": laplace,
    "leaky_relu": lambda x: np.where(x > 0.0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(softplus(x)),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0.0),
    "relu2": lambda x: np.maximum(x, 0.0) ** 2,
    "relu6": lambda x: np.clip(x, 0.0, 6.0),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
}


# --- the pieces of a layer ------------------------------------------------------------------------


def softmax(scores: Array) -> Array:
    """Softmax over the last axis."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def linear(x: Array, weights: Weights, name: str, *, bias: bool) -> Array:
    """`x` [..., in] times the (out, in) matrix of that name, plus its bias."""
    y = x @ weights[f"{name}.weight"].T  # [..., out]
    return y + weights[f"{name}.bias"] if bias else y


def layer_norm(config: Config, weights: Weights, name: str, x: Array) -> Array:
    """Layer norm over D; without scale and bias where the config says so."""
    centred = x - x.mean(axis=-1, keepdims=True)  # [B, T, D]
    y = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + LAYER_NORM_EPS)
    if not config.layer_norm_elementwise_affine:
        return y
    return y * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def positions_from_mask(attention_mask: Array) -> Array:
    """Positions [B, T] counted over real tokens only; a pad has position -1."""
    return np.cumsum(attention_mask, axis=1) * attention_mask - 1


def visible_keys(attention_mask: Array) -> Array:
    """Whether query t may look at key s: neither a pad nor later. [B, 1, T, S]"""
    length = attention_mask.shape[1]
    causal = np.tril(np.ones((length, length), dtype=bool))  # [T, S]
    return causal & (attention_mask == 1)[:, None, None, :]


def attention(
    config: Config,
    weights: Weights,
    layer: int,
    x: Array,
    *,
    visible: Array,
    head_mask: Array | None,
    trace: Trace,
) -> Array:
    """Multi-head attention of `x` [B, T, D] to itself, [B, T, D]."""
    batch, length, hidden = x.shape
    heads = (batch, length, config.num_attention_heads, hidden // config.num_attention_heads)

    def project(name: str, y: Array) -> Array:
        module = f"model.decoder.layers.{layer}.self_attn.{name}"
        return linear(y, weights, module, bias=config.enable_bias)

    # The query is scaled after its bias and before the product.
    query = (project("q_proj", x) * heads[-1] ** -0.5).reshape(heads).swapaxes(1, 2)  # [B, N, T, H]
    key = project("k_proj", x).reshape(heads).swapaxes(1, 2)  # [B, N, S, H]
    value = project("v_proj", x).reshape(heads).swapaxes(1, 2)  # [B, N, S, H]

    # Replaced by a finite number, not by -inf: a row that sees nothing gets the mean of all values.
    scores = np.where(visible, query @ key.swapaxes(2, 3), np.finfo(np.float64).min)  # [B, N, T, S]
    probabilities = softmax(scores)  # [B, N, T, S]
    if head_mask is not None:
        probabilities = probabilities * head_mask[layer][:, None, None]
    context = (probabilities @ value).swapaxes(1, 2).reshape(x.shape)  # [B, T, D]

    trace |= {f"layers/{layer}/query": query, f"layers/{layer}/scores": scores}
    trace |= {f"past_key_values/{layer}/key": key, f"past_key_values/{layer}/value": value}
    trace |= {f"attentions/{layer}": probabilities, f"layers/{layer}/context": context}
    return project("out_proj", context)


def decoder_layer(
    config: Config,
    weights: Weights,
    layer: int,
    x: Array,
    *,
    visible: Array,
    head_mask: Array | None,
    trace: Trace,
) -> Array:
    """Attention, then the feed-forward network, each with its residual and its norm. [B, T, D]"""
    module = f"model.decoder.layers.{layer}"
    attention_norm, ffn_norm = f"{module}.self_attn_layer_norm", f"{module}.final_layer_norm"
    pre_norm = config.do_layer_norm_before

    y = layer_norm(config, weights, attention_norm, x) if pre_norm else x
    y = attention(config, weights, layer, y, visible=visible, head_mask=head_mask, trace=trace)
    trace[f"layers/{layer}/attention"] = y
    x = x + y  # [B, T, D]
    if not pre_norm:  # opt-350m normalises after the residual
        x = layer_norm(config, weights, attention_norm, x)

    y = layer_norm(config, weights, ffn_norm, x) if pre_norm else x
    y = linear(y, weights, f"{module}.fc1", bias=config.enable_bias)  # [B, T, F]
    y = ACTIVATIONS[config.activation_function](y)
    trace[f"layers/{layer}/activation"] = y
    y = linear(y, weights, f"{module}.fc2", bias=config.enable_bias)  # [B, T, D]
    trace[f"layers/{layer}/ffn"] = y
    x = x + y
    return x if pre_norm else layer_norm(config, weights, ffn_norm, x)


# --- the model ------------------------------------------------------------------------------------


def decoder(
    config: Config,
    weights: Weights,
    embeds: Array,
    *,
    attention_mask: Array,
    positions: Array,
    head_mask: Array | None,
    trace: Trace,
) -> Array:
    """The last hidden state [B, T, E] of word embeddings `embeds` [B, T, E]."""
    projects = config.word_embed_proj_dim != config.hidden_size  # opt-350m only
    x = linear(embeds, weights, "model.decoder.project_in", bias=False) if projects else embeds
    rows = positions + POSITION_OFFSET  # a pad reads row 1, the first token row 2, nobody row 0
    trace["positions"] = positions
    x = x + weights["model.decoder.embed_positions.weight"][rows]  # [B, T, D]
    visible = visible_keys(attention_mask)
    for layer in range(config.num_hidden_layers):
        trace[f"hidden_states/{layer}"] = x
        x = decoder_layer(
            config, weights, layer, x, visible=visible, head_mask=head_mask, trace=trace
        )
    if config.do_layer_norm_before and not config._remove_final_layer_norm:
        x = layer_norm(config, weights, "model.decoder.final_layer_norm", x)
    if projects:
        x = linear(x, weights, "model.decoder.project_out", bias=False)  # [B, T, E]
    trace[f"hidden_states/{config.num_hidden_layers}"] = trace["last_hidden_state"] = x
    return x


def causal_lm_loss(logits: Array, labels: Array) -> Array:
    """Mean cross entropy of each next token; NaN where every label is ignored."""
    logits, targets = logits[:, :-1], labels[:, 1:]  # [B, T-1, V], [B, T-1]
    kept = targets != IGNORED_LABEL
    top = logits.max(axis=-1)
    log_sum = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))  # [B, T-1]
    chosen = np.take_along_axis(logits, np.where(kept, targets, 0)[..., None], -1)[..., 0]
    return np.mean((log_sum - chosen)[kept]) if kept.any() else np.array(np.nan)


def forward(
    config: Config,
    weights: Weights,
    input_ids: Array | None = None,
    *,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    head_mask: Array | None = None,
    inputs_embeds: Array | None = None,
    labels: Array | None = None,
) -> Trace:
    """Everything an OPTForCausalLM computes, in float64.

    `input_ids` [B, T] or `inputs_embeds` [B, T, E]; `attention_mask` [B, T] is 1 at real tokens;
    `position_ids` [B, T] count from 0; `head_mask` [L, N]; `labels` [B, T], -100 is ignored.
    The trace holds `logits` [B, T, V], `last_hidden_state` [B, T, E], `loss` if there are labels.
    """
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    table = weights["model.decoder.embed_tokens.weight"]  # [V, E]
    embeds = table[input_ids] if inputs_embeds is None else inputs_embeds.astype(np.float64)
    if attention_mask is None:
        attention_mask = np.ones(embeds.shape[:2], dtype=np.int64)
    trace: Trace = {"embeddings": embeds}
    x = decoder(
        config,
        weights,
        embeds,
        attention_mask=attention_mask,
        positions=positions_from_mask(attention_mask) if position_ids is None else position_ids,
        head_mask=head_mask,
        trace=trace,
    )
    trace["logits"] = x @ (table if config.tie_word_embeddings else weights["lm_head.weight"]).T
    if labels is not None:
        trace["loss"] = causal_lm_loss(trace["logits"], labels)
    return trace


def greedy(
    config: Config, weights: Weights, row: Sequence[int], count: int, *, eos: Sequence[int] = ()
) -> list[int]:
    """Up to `count` likeliest tokens after one unpadded row; the last one may be an `eos`."""
    tokens = list(row)
    for _ in range(count):
        logits = forward(config, weights, np.array([tokens]))["logits"]  # [1, T, V]
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in eos:
            break
    return tokens[len(row) :]
