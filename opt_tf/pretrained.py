# SPDX-License-Identifier: Apache-2.0
"""What every model class can do besides running: load and save."""

from __future__ import annotations

import inspect
import os
from typing import Any, ClassVar, Self

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core import GenerationConfig, InputError, OPTConfig
from opt_core.params import num_parameters, param_table
from opt_core.pretrained import open_pretrained, save_pretrained
from opt_core.resizing import resized_vocab_size
from opt_tf._keras import replace_layer
from opt_tf.attention import DEFAULT_KERNEL, KERNELS
from opt_tf.cache import KVCache
from opt_tf.decoding_weights import prepare
from opt_tf.export import write_saved_model
from opt_tf.generation.programs import ModelPrograms
from opt_tf.inputs import check_inputs, named_inputs
from opt_tf.training import KerasModel
from opt_tf.weights import assign, canonical_arrays, initialize, resized


class TFOPTPreTrainedModel(KerasModel):
    """The common part of the model classes."""

    architecture: ClassVar[str]
    base_model_prefix = "model"

    def __init__(
        self,
        config: OPTConfig,
        *,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Makes a model with fresh parameters.

        Args:
            config: its architecture.
            attn_implementation: "eager" (the default) or "sdpa".
            kwargs: `name`, `dtype` (a dtype's name or a Keras policy) and `trainable`, as of any
                Keras model.
        """
        if not isinstance(config, OPTConfig):
            raise InputError(
                f"{type(self).__name__} expects an OPTConfig, found {type(config).__name__}. To load "
                f"a checkpoint, call {type(self).__name__}.from_pretrained(name_or_path)."
            )
        if attn_implementation not in (None, *KERNELS):
            raise InputError(
                f"Unknown attn_implementation {attn_implementation!r}: expected one of {[*KERNELS]}."
            )
        super().__init__(**kwargs)
        self.config = config
        self.attn_implementation = attn_implementation or DEFAULT_KERNEL
        self.generation_config = GenerationConfig.from_model_config(config)
        self.programs = ModelPrograms()  # of `generate`

    def post_init(self) -> None:
        """Makes the variables, and draws initial values of what this class adds to its base model."""
        is_base = self.architecture == "OPTModel"
        table = param_table(self.config, self.architecture)
        added = tuple(p for p in table if is_base or not p.in_base_model)
        with keras.StatelessScope():  # variables are made when the outermost such scope ends
            self.build()
            initialize(self, self.config, added, self.architecture)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on inputs given in any of the ways of `opt_tf.inputs`; see `call`."""
        names = [*inspect.signature(self.call).parameters]
        inputs = named_inputs(names, args, kwargs)
        check_inputs(self.config, inputs)
        return super().__call__(**inputs)

    def tie_weights(self) -> None:
        """Makes the head the embedding again, where the configuration ties the two."""
        head = self.get_output_embeddings()
        is_own = head is not None and head is not self.get_input_embeddings()
        if is_own and self.config.tie_word_embeddings:
            self._replace(self, "lm_head", None)

    @property
    def _actual_config(self) -> OPTConfig:
        """The configuration as the head is: untied where it is no longer the embedding."""
        if self.get_output_embeddings() in (None, self.get_input_embeddings()):
            return self.config
        return self.config.replace(tie_word_embeddings=False)

    def get_input_embeddings(self) -> keras.layers.Embedding:
        return self._decoder.embed_tokens

    def set_input_embeddings(self, value: keras.layers.Embedding) -> None:
        """Gives the model other word embeddings; a tied head follows them.

        What was compiled is forgotten, as by `resize_token_embeddings`.
        """
        self._replace(self._decoder, "embed_tokens", value)

    def get_output_embeddings(self) -> keras.layers.Layer | None:
        return None

    def set_output_embeddings(self, value: keras.layers.Dense) -> None:
        """Gives the model another language modelling head.

        What was compiled is forgotten, as by `resize_token_embeddings`.

        Raises:
            InputError: the model has none, or it is tied to the word embeddings.
        """
        raise InputError(f"{type(self).__name__} has no language modelling head.")

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> keras.layers.Embedding:
        """Gives the word embeddings, and the head of a language model, another number of rows.

        The first rows stay, new ones are drawn as in a fresh model; `config.vocab_size` follows. They
        are new layers with new variables: `compile` the model again before `fit`, and make each
        `tf.function` of your own anew.

        Args:
            new_num_tokens: the number of rows; None keeps it, or rounds it up.
            pad_to_multiple_of: rounds the number up to a multiple.

        Returns:
            The word embeddings.

        Raises:
            InputError: a number that is none, or too small for the special tokens.
            UnsupportedError: quantized embeddings, or such with LoRA.
        """
        size = resized_vocab_size(self.config, new_num_tokens, pad_to_multiple_of)
        table, head = self.get_input_embeddings(), self.get_output_embeddings()
        if size != self.config.vocab_size:
            std, is_own = self.config.init_std, head is not None and head is not table
            with self.distribute_strategy.scope():  # variables belong to that of the model
                new_table = resized(table, size, std)
                new_head = resized(head, size, std) if is_own else None
            self._replace(self._decoder, "embed_tokens", new_table)
            if is_own:
                self._replace(self, "lm_head", new_head)
            self.config.vocab_size = size
        return self.get_input_embeddings()

    def _replace(self, owner: keras.layers.Layer, name: str, layer: Any) -> None:
        """Puts another layer, or none, in a place; what was compiled still has the one before."""
        if layer is not None and not layer.built:
            layer.build((None, self.config.word_embed_proj_dim))
        replace_layer(owner, name, layer)
        self._forget()

    @property
    def _decoder(self) -> Any:
        base: Any = self if self.architecture == "OPTModel" else self.model
        return base.decoder

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self._decoder.gradient_checkpointing

    def gradient_checkpointing_enable(self) -> None:
        """In training, computes each layer again for its gradients instead of keeping what it needs.

        Losses and gradients stay the same, memory falls to one layer's, and no cache is returned.
        """
        self._decoder.gradient_checkpointing = True
        self.train_function = None  # compiled again by the next `fit`

    def gradient_checkpointing_disable(self) -> None:
        """Keeps what the layers' gradients need again, which is the default."""
        self._decoder.gradient_checkpointing = False
        self.train_function = None

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Inputs [1, 2] to try a model with."""
        ones = tf.ones((1, 2), tf.int32)
        return {"input_ids": ones, "attention_mask": ones}

    def clear_compiled(self) -> None:
        """Frees what `generate` has compiled for this model.

        TensorFlow forgets all programs of XLA at once: those of others, too, are compiled again when they
        are next called. It waits as long as another thread computes.
        """
        self.programs.clear()

    def num_parameters(self) -> int:
        """The number of scalars, the tied head counted once."""
        return num_parameters(self._actual_config, self.architecture)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty fixed cache, to be passed as `past_key_values`."""
        config = self.config
        shape = (batch_size, config.num_attention_heads, max_length, config.head_dim)
        return KVCache.fixed(config.num_hidden_layers, shape, self.compute_dtype)

    def prepare_for_decoding(self, *, batch_size: int = 1, weights: str | None = None) -> Self:
        """Lays the linear layers' weights out for fast decoding on a CPU, in place.

        By default nothing changes: compiled TensorFlow reads the weights as they lie.

        Args:
            batch_size: not used: the weights serve any number of rows.
            weights: "int8" rounds the weights of the linear layers to eight bits, by Keras' own
                quantization with one scale for each output; activations and the embeddings, so a
                tied head too, stay as they are. This is lossy and cannot be undone.

        Returns:
            The model itself.

        Raises:
            InputError: an unknown `weights`.
            UnsupportedError: later, by `save_pretrained`, which needs the weights unrounded.
        """
        prepare(self, batch_size, weights)
        return self

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        attn_implementation: str | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Self | tuple[Self, dict[str, list[str]]]:
        """Loads a checkpoint from a directory or from the hub.

        A global mixed policy of Keras holds here too, if it keeps variables in the dtype loaded.

        Args:
            name_or_path: a directory, or the name of a model on the hub.
            attn_implementation: "eager" (the default) or "sdpa".
            output_loading_info: returns (model, report) instead of raising about missing or
                unexpected tensors.
            options: `dtype`, `config`, `ignore_mismatched_sizes`, hub options and configuration
                overrides: see `opt_core.pretrained.open_pretrained`, which also lists the errors.
        """
        with open_pretrained(
            name_or_path, cls.architecture, output_loading_info=output_loading_info, **options
        ) as pretrained:
            _, report = pretrained.check()
            config = pretrained.config
            policy = keras.config.dtype_policy()
            dtype = policy if policy.variable_dtype == pretrained.dtype else pretrained.dtype
            with keras.StatelessScope():  # variables are made when it ends: of the checkpoint
                model = cls(config, attn_implementation=attn_implementation, dtype=dtype)
                assign(model, config, cls.architecture, pretrained.sources)
        model.generation_config = pretrained.generation_config
        return (model, report.loading_info()) if output_loading_info else model

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        saved_model: bool = False,
        version: int = 1,
        signatures: Any = None,
    ) -> None:
        """Writes config, generation config and canonical safetensors into `directory`.

        Args:
            directory: made if need be.
            max_shard_size: bytes, or such as "5GB".
            safe_serialization: if False, tf_model.h5 is written instead of safetensors.
            saved_model: writes a TensorFlow SavedModel too, into `saved_model/<version>`.
            version: of that.
            signatures: of that; by default "serving_default" of int32 ids and "int64_serving".
        """
        config, arch = self._actual_config, self.architecture
        save_pretrained(
            directory,
            config,
            self.generation_config,
            arch,
            canonical_arrays(self, config, arch),
            own_format="h5",
            max_shard_size=max_shard_size,
            safe_serialization=safe_serialization,
        )
        if saved_model:
            path = os.path.join(directory, "saved_model", str(version))
            write_saved_model(self, path, signatures)
