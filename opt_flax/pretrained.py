# SPDX-License-Identifier: Apache-2.0
"""What every model class can do besides running: load and save."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array

from opt_core import GenerationConfig, InputError, OPTConfig
from opt_core.dtypes import MODEL_DTYPES, dtype_name
from opt_core.params import EMBEDDING_NAME, TIED_HEAD_NAME, num_parameters, param_table
from opt_core.pretrained import open_pretrained, save_pretrained
from opt_core.resizing import resized_vocab_size
from opt_flax.attention import DEFAULT_KERNEL, KERNELS
from opt_flax.cache import KVCache
from opt_flax.decoding_weights import check_layout, plain, prepare
from opt_flax.generation.programs import ModulePrograms, programs_of
from opt_flax.parts import to_array
from opt_flax.weights import (
    Params,
    assign,
    canonical_arrays,
    cast,
    check_params,
    check_rows,
    find_rows,
    initialize,
    resized,
    with_rows,
)

#: The module of a head of its own.
HEAD = TIED_HEAD_NAME.partition(".")[0]


class FlaxOPTPreTrainedModel:
    """The common part of the model classes.

    Args:
        config: the model's sizes and options.
        input_shape: not used, since the parameters' shapes follow from the configuration alone.
        seed: of the initial values.
        dtype: of the computation, in every layer.
        _do_init: False leaves the model without `params`; they are then an argument of each call.
        param_dtype: of the initial values.
        attn_implementation: "eager" (the default) or "sdpa".
    """

    architecture: ClassVar[str]
    module_class: ClassVar[type[nn.Module]]
    base_model_prefix = "model"

    def __init__(
        self,
        config: OPTConfig,
        input_shape: tuple[int, ...] = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        *,
        param_dtype: Any = jnp.float32,
        attn_implementation: str | None = None,
    ) -> None:
        if not isinstance(config, OPTConfig):
            raise InputError(
                f"{type(self).__name__} expects an OPTConfig, found {type(config).__name__}. To load "
                f"a checkpoint, call {type(self).__name__}.from_pretrained(name_or_path)."
            )
        if attn_implementation not in (None, *KERNELS):
            raise InputError(
                f"Unknown attn_implementation {attn_implementation!r}: expected one of {[*KERNELS]}."
            )
        self.config = config
        self.attn_implementation = attn_implementation or DEFAULT_KERNEL
        self.generation_config = GenerationConfig.from_model_config(config)
        self.dtype = _available(dtype)
        self.param_dtype = _available(param_dtype)
        if self.attn_implementation == "sdpa" and self.dtype == np.float64:
            raise InputError(
                "attn_implementation='sdpa' has a softmax in float32, even in a float64 model: "
                "use 'eager'."
            )
        self.module = self.module_class(
            config, self.attn_implementation, self.dtype, self.param_dtype
        )
        self.programs: ModulePrograms | None = None  # of `generate`
        self._params: Params | None = None
        if _do_init:
            self._params = self.init_weights(jax.random.key(seed), input_shape)

    def init_weights(self, rng: Array, input_shape: tuple[int, ...] = (1, 1)) -> Params:
        """Draws initial values from the key: a new tree, the model keeps its own.

        Args:
            input_shape: not used, as in the constructor.
        """
        table = param_table(self.config, self.architecture)
        return unflatten_dict(
            initialize(rng, self.config, table, self.architecture, self.param_dtype)
        )

    @property
    def params(self) -> Params:
        """The parameters: plain nested dicts with the reference's names.

        Those that are set may be a tree laid out by `prepare_for_decoding`, and become plain again.

        Raises:
            InputError: the model was made with `_do_init=False` and none were set; or, when set,
                names or shapes that differ from the configuration's.
        """
        if self._params is None:
            raise InputError(
                "This model was made with _do_init=False and holds no parameters: pass params= to "
                "each call, or set model.params. init_weights(rng) draws some."
            )
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        self._params = check_params(plain(params), self.config, self.architecture)

    def tie_weights(self) -> None:
        """Makes the head the embedding again, where the configuration ties the two."""
        if self.config.tie_word_embeddings:
            self._params = {key: x for key, x in self.params.items() if key != HEAD}

    def get_input_embeddings(self) -> Array:
        """[V, E] of `params`."""
        return find_rows(self.params, self.config, self.architecture, EMBEDDING_NAME)

    def set_input_embeddings(self, value: Any) -> None:
        """Gives the model other word embeddings [V, E]; a tied head follows them.

        Raises:
            InputError: another shape.
        """
        self._set_rows(EMBEDDING_NAME, value)

    def get_output_embeddings(self) -> Array | None:
        return None

    def set_output_embeddings(self, value: Any) -> None:
        """Gives the model another language modelling head [V, E].

        Raises:
            InputError: the model has none, or it is tied to the word embeddings; another shape.
        """
        raise InputError(f"{type(self).__name__} has no language modelling head.")

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> Array | Mapping[str, Any]:
        """Gives the word embeddings, and the head of a language model, another number of rows.

        The first rows stay, new ones are drawn as in a fresh model. `params` becomes another tree;
        `config` and `module` become others too, with that `vocab_size`. States of an optimizer have
        to be made anew.

        Args:
            new_num_tokens: the number of rows; None keeps it, or rounds it up.
            pad_to_multiple_of: rounds the number up to a multiple.
            params: the tree to resize, for a model that holds none (`_do_init=False`).
            seed: of the new rows.

        Returns:
            The word embeddings [V, E]; the whole tree instead, if `params` was given.

        Raises:
            InputError: a number that is none, or too small for the special tokens; `params` for a
                model with its own, or none for one without.
        """
        if params is not None and self._params is not None:
            raise InputError(
                "This model holds parameters, which params= would leave behind: set model.params to "
                "those that you want resized, and leave params= out."
            )
        size = resized_vocab_size(self.config, new_num_tokens, pad_to_multiple_of)
        tree = self._given(params)
        if size != self.config.vocab_size:
            config, arch = self.config, self.architecture
            for index, param in enumerate(param_table(config, arch)):
                if "vocab" in param.spec.axes:
                    key = jax.random.fold_in(jax.random.key(seed), index)
                    rows = find_rows(tree, config, arch, param.name)
                    rows = resized(rows, size, config.init_std, key)
                    tree = with_rows(tree, config, arch, param.name, rows)
            self.config = self.config.replace(vocab_size=size)
            self.module = self.module.clone(config=self.config)
        if params is not None:
            return tree
        self._params = dict(tree)
        return self.get_input_embeddings()

    def _set_rows(self, name: str, value: Any) -> None:
        table = self.get_input_embeddings()
        rows = jnp.asarray(value, table.dtype)
        check_rows(name, rows, table.shape)
        self._params = with_rows(self.params, self.config, self.architecture, name, rows)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.module.gradient_checkpointing)

    def gradient_checkpointing_enable(self) -> None:
        """In training, computes each layer again for its gradients instead of keeping what it needs.

        Losses and gradients stay the same, memory falls to one layer's, and no cache is returned.
        A function that is compiled already keeps the module that it was compiled with.
        """
        self.module = self.module.clone(gradient_checkpointing=True)

    enable_gradient_checkpointing = gradient_checkpointing_enable  # the reference's name in Flax

    def gradient_checkpointing_disable(self) -> None:
        """Keeps what the layers' gradients need again, which is the default."""
        self.module = self.module.clone(gradient_checkpointing=False)

    def clear_compiled(self) -> None:
        """Frees what `generate` has compiled for this model, and so for others that compute the same."""
        programs_of(self.module).clear()

    def num_parameters(self) -> int:
        """The number of scalars, the tied head counted once."""
        return num_parameters(self.config, self.architecture)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty fixed cache, to be passed as `past_key_values`."""
        config = self.config
        shape = (batch_size, config.num_attention_heads, max_length, config.head_dim)
        return KVCache.fixed(config.num_hidden_layers, shape, self.dtype)

    def prepare_for_decoding(self, *, batch_size: int = 1, weights: str | None = None) -> Self:
        """Lays the linear layers' weights out for fast decoding on a CPU, in place.

        No number changes, and logits only by the order of a sum. In `params`, each matrix `kernel`
        [I, O] on a CPU is replaced by its transpose `weight` [O, I]; on other devices, where nothing
        is gained, all stay as they are. Such a tree runs, differentiates and is saved like a plain
        one; `model.params = model.params` makes it plain again, exactly.

        Args:
            batch_size: not used: the layout serves any number of rows.
            weights: None; JAX multiplies rounded weights on a CPU no faster than plain ones.

        Returns:
            The model itself.

        Raises:
            InputError: the model holds no parameters, or an unknown `weights`.
            UnsupportedError: `weights="int8"`.
        """
        check_layout(batch_size, weights)
        prepare(self.params)
        return self

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        attn_implementation: str | None = None,
        output_loading_info: bool = False,
        param_dtype: Any = None,
        _do_init: bool = True,
        **options: Any,
    ) -> Self | tuple[Any, ...]:
        """Loads a checkpoint from a directory or from the hub.

        As in the constructor, `dtype` is the computation's: it rounds no parameter. These keep the
        type that each has in the file, unless `param_dtype` says otherwise, or a `dtype` is given
        that is wider. In 16 bits they lose the small updates of a training: a warning says so, unless
        `param_dtype` or `dtype` names that type.

        Args:
            name_or_path: a directory, or the name of a model on the hub.
            attn_implementation: "eager" (the default) or "sdpa".
            output_loading_info: returns (model, report) instead of raising about missing or
                unexpected tensors.
            param_dtype: to hold the parameters in: a dtype, its name, or "auto" for that of the
                checkpoint as a whole. Without it, what the checkpoint lacks starts anew in float32.
            _do_init: False returns (model, params), the model without parameters of its own; with
                `output_loading_info`, (model, params, report).
            options: `dtype`, `config`, `ignore_mismatched_sizes`, hub options and configuration
                overrides: see `opt_core.pretrained.open_pretrained`, which also lists the errors.
        """
        with open_pretrained(
            name_or_path, cls.architecture, output_loading_info=output_loading_info, **options
        ) as pretrained:
            _, report = pretrained.check()
            config, sources = pretrained.config, pretrained.sources
            if isinstance(param_dtype, str) and param_dtype == "auto":
                param_dtype = pretrained.stored_dtype
            model = cls(
                config,
                dtype=pretrained.dtype,
                _do_init=False,
                param_dtype=jnp.float32 if param_dtype is None else param_dtype,
                attn_implementation=attn_implementation,
            )
            held = partial(
                _held_dtype,
                None if param_dtype is None else model.param_dtype,
                model.dtype if pretrained.is_named else None,
            )
            params = assign(config, cls.architecture, sources, held, model.param_dtype)
        config.torch_dtype = find_rows(params, config, cls.architecture, EMBEDDING_NAME).dtype.name
        if param_dtype is None:
            _warn_of_16_bits(name_or_path, params, model.dtype)
        model.generation_config = pretrained.generation_config
        if _do_init:
            model._params = params
        loaded: tuple[Any, ...] = (model,) if _do_init else (model, params)
        if output_loading_info:
            loaded += (report.loading_info(),)
        return loaded if len(loaded) > 1 else model

    def to_bf16(self, params: Mapping[str, Any], mask: Any = None) -> Params:
        """Another tree of parameters, in bfloat16; with a mask (a tree of bools), where it is True."""
        return cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Mapping[str, Any], mask: Any = None) -> Params:
        """Another tree of parameters, in float16; with a mask (a tree of bools), where it is True."""
        return cast(params, jnp.float16, mask)

    def to_fp32(self, params: Mapping[str, Any], mask: Any = None) -> Params:
        """Another tree of parameters, in float32; with a mask (a tree of bools), where it is True."""
        return cast(params, jnp.float32, mask)

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        params: Mapping[str, Any] | None = None,
        *,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
    ) -> None:
        """Writes config, generation config and canonical safetensors into `directory`.

        Args:
            directory: made if need be.
            params: the parameters to write instead of `self.params`.
            max_shard_size: bytes, or such as "5GB".
            safe_serialization: if False, flax_model.msgpack is written instead of safetensors.
        """
        given = plain(self._given(params), views=True)
        params = check_params(given, self.config, self.architecture)
        tensors = canonical_arrays(params, self.config, self.architecture)
        save_pretrained(
            directory,
            self.config,
            self.generation_config,
            self.architecture,
            tensors,
            own_format="msgpack",
            max_shard_size=max_shard_size,
            safe_serialization=safe_serialization,
        )

    def _given(self, params: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """The parameters of a call, or the model's; raises InputError for a head that would be ignored."""
        tree = self.params if params is None else params
        if HEAD in tree and self.config.tie_word_embeddings:
            raise InputError(
                f"params: expected no {HEAD}, since config.tie_word_embeddings makes the head the word "
                f"embedding, found one. Make the model with tie_word_embeddings=False to use it, or "
                f"leave {HEAD} out, as model.tie_weights() does."
            )
        return tree

    def _call(
        self,
        params: Mapping[str, Any] | None,
        dropout_rng: Array | None,
        deterministic: bool,
        arrays: Mapping[str, Any],
        **arguments: Any,
    ) -> Any:
        """Runs the module, with `arrays` (lists and numpy's too) and `arguments`."""
        config = self.config
        drops = max(config.dropout, config.attention_dropout, config.layerdrop) > 0
        if drops and not deterministic and dropout_rng is None:
            raise InputError(
                f"Training with dropout={config.dropout}, attention_dropout="
                f"{config.attention_dropout}, layerdrop={config.layerdrop} needs a dropout_rng: "
                "pass one such as jax.random.key(0), a new one for each step."
            )
        for name, value in arrays.items():
            arguments[name] = None if value is None else to_array(name, value)
        return self.module.apply(
            {"params": self._given(params)},
            **arguments,
            deterministic=deterministic,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
        )


def _available(dtype: Any) -> np.dtype:
    """The dtype of that name or object, if JAX has it switched on."""
    found = MODEL_DTYPES[dtype_name(dtype)]
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise InputError(
            f"dtype {found}: JAX computes in 64 bits only after "
            'jax.config.update("jax_enable_x64", True).'
        )
    return found


def _warn_of_16_bits(where: object, params: Params, dtype: np.dtype) -> None:
    """Says that parameters have 16 bits, unless that is the dtype of the computation too."""
    narrow = {x.dtype for x in jax.tree.leaves(params) if x.dtype.itemsize == 2} - {dtype}
    if narrow:
        names = " and ".join(sorted(x.name for x in narrow))
        warnings.warn(
            f"The parameters of {where} are kept in {names}, in which a training loses small updates. "
            'Pass param_dtype="float32" to train (to decode on a CPU, too), or '
            f'param_dtype="{min(x.name for x in narrow)}" if it is meant.',
            stacklevel=3,
        )


def _held_dtype(param_dtype: np.dtype | None, named: np.dtype | None, stored: np.dtype) -> np.dtype:
    """The dtype to hold a tensor in: the one asked for, else its own.

    Args:
        named: that of the computation, where the caller named it: one that is wider counts as asked for.
        stored: the file's.
    """
    if param_dtype is not None:
        return param_dtype
    own = jax.dtypes.canonicalize_dtype(stored)  # float64 only where JAX has it switched on
    return named if named is not None and named.itemsize > own.itemsize else own
