# SPDX-License-Identifier: Apache-2.0
"""What every model class can do besides running: load and save."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from opt_core import GenerationConfig, InputError, OPTConfig, UnsupportedError
from opt_core.checkpoints.sources import NamedFile
from opt_core.params import num_parameters, param_table
from opt_core.pretrained import open_pretrained, save_pretrained
from opt_core.resizing import resized_vocab_size
from opt_torch.attention import DEFAULT_KERNEL, KERNELS
from opt_torch.cache import KVCache
from opt_torch.decoding_weights import prepare, restore
from opt_torch.flash import kernels as find_flash_kernels
from opt_torch.generation.graphs import forget
from opt_torch.mapping import NO_FILES, Files, decide, watch
from opt_torch.offload import Device, DeviceMap, MaxMemory, computing_device, is_away, place
from opt_torch.parts import without_values
from opt_torch.weights import (
    added_outgoing,
    added_tensors,
    assign,
    assign_added,
    canonical_arrays,
    follow,
    initialize,
    resized,
    share_memory,
)


class OPTPreTrainedModel(nn.Module):
    """The common part of the model classes."""

    architecture: ClassVar[str]
    base_model_prefix = "model"
    _files = NO_FILES

    def __init__(self, config: OPTConfig, attn_implementation: str | None = None) -> None:
        if not isinstance(config, OPTConfig):
            raise InputError(
                f"{type(self).__name__} expects an OPTConfig, found {type(config).__name__}. To load "
                f"a checkpoint, call {type(self).__name__}.from_pretrained(name_or_path)."
            )
        if attn_implementation not in (None, *KERNELS):
            raise InputError(
                f"Unknown attn_implementation {attn_implementation!r}: expected one of {[*KERNELS]}."
            )
        super().__init__()
        self.config = config
        self.attn_implementation = attn_implementation or DEFAULT_KERNEL
        if self.attn_implementation == "flash_attention_2":
            find_flash_kernels()  # no compiled program could
        self.generation_config = GenerationConfig.from_model_config(config)

    def post_init(self) -> None:
        """Draws the initial values of what this class adds to its base model, and ties the head."""
        is_base = self.architecture == "OPTModel"
        table = param_table(self.config, self.architecture)
        added = tuple(p for p in table if is_base or not p.in_base_model)
        initialize(self, self.config, added, self.architecture)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the head the embedding again, where the configuration ties the two."""
        head = self.get_output_embeddings()
        if head is not None and self.config.tie_word_embeddings:
            head.weight = self.get_input_embeddings().weight

    @property
    def _is_tied(self) -> bool:
        """Whether the head is the embedding, whatever the configuration says."""
        head, table = self.get_output_embeddings(), self.get_input_embeddings()
        weight = None if head is None else getattr(head, "weight", None)
        if not isinstance(weight, Tensor):
            return False
        if weight.is_meta:  # without values, or on disk
            return self.config.tie_word_embeddings
        return share_memory(weight, table.weight)

    @property
    def _actual_config(self) -> OPTConfig:
        """The configuration as the head is: untied where it is no longer the embedding."""
        if self.get_output_embeddings() is None or self._is_tied:
            return self.config
        return self.config.replace(tie_word_embeddings=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self._decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Gives the model other word embeddings; a tied head follows them."""
        was_tied = self._is_tied
        self._decoder.embed_tokens = value
        if was_tied:
            self.get_output_embeddings().weight = value.weight

    def get_output_embeddings(self) -> nn.Linear | None:
        return None

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Gives the model another language modelling head.

        Raises:
            InputError: the model has none, or it is tied to the word embeddings.
        """
        raise InputError(f"{type(self).__name__} has no language modelling head.")

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Gives the word embeddings, and the head of a language model, another number of rows.

        The first rows stay, new ones are drawn as in a fresh model; `config.vocab_size` follows.

        Args:
            new_num_tokens: the number of rows; None keeps it, or rounds it up.
            pad_to_multiple_of: rounds the number up to a multiple.

        Returns:
            The word embeddings.

        Raises:
            InputError: a number that is none, or too small for the special tokens.
            UnsupportedError: weights that lie on disk.
        """
        size = resized_vocab_size(self.config, new_num_tokens, pad_to_multiple_of)
        table, head = self.get_input_embeddings(), self.get_output_embeddings()
        if size != self.config.vocab_size:
            if any(is_away(module) for module in (table, head) if module is not None):
                raise UnsupportedError(
                    "resize_token_embeddings: expected weights in memory, found some that device_map "
                    "left elsewhere. Load the model without it, resize, save, and load what was saved."
                )
            self._files.check(self)
            restore(self)
            was_tied = self._is_tied
            table.weight = resized(table.weight, size, self.config.init_std)
            table.num_embeddings = size
            if head is not None:
                std = self.config.init_std
                head.weight = table.weight if was_tied else resized(head.weight, size, std)
                head.out_features = size
            self.config.vocab_size = size
        return table

    @property
    def dtype(self) -> torch.dtype:
        return self.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        return computing_device(self.get_input_embeddings())

    @property
    def _decoder(self) -> Any:
        base: Any = self if self.architecture == "OPTModel" else self.model
        return base.decoder

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self._decoder.gradient_checkpointing

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """In training, computes each layer again for its gradients instead of keeping what it needs.

        Losses and gradients stay the same, memory falls to one layer's, and no cache is returned.

        Args:
            gradient_checkpointing_kwargs: None or {"use_reentrant": False}, which is how it is done.

        Raises:
            UnsupportedError: other options of `torch.utils.checkpoint`.
        """
        if (gradient_checkpointing_kwargs or {}) not in ({}, {"use_reentrant": False}):
            raise UnsupportedError(
                "gradient_checkpointing_kwargs: expected None or {'use_reentrant': False}, found "
                f"{gradient_checkpointing_kwargs!r}. With frozen weights too, nothing else is needed."
            )
        self._decoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keeps what the layers' gradients need again, which is the default."""
        self._decoder.gradient_checkpointing = False

    def clear_compiled(self) -> None:
        """Frees what `generate` has recorded for this model: CUDA graphs, each with its cache."""
        forget(self)

    def num_parameters(self) -> int:
        """The number of scalars, the tied head counted once."""
        return num_parameters(self._actual_config, self.architecture)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty fixed cache, to be passed as `past_key_values`."""
        config = self.config
        shape = (batch_size, config.num_attention_heads, max_length, config.head_dim)
        return KVCache.fixed(config.num_hidden_layers, shape, self.dtype, self.device)

    def prepare_for_decoding(self, *, batch_size: int = 1, weights: str | None = None) -> Self:
        """Lays the linear layers' weights out for fast decoding, in place.

        By default no number changes, and logits only by the order of a sum: the weights are packed
        where that is found to be faster on this processor; elsewhere, on other devices and in
        float64 they stay as they are. The plain weights are freed, except that of a tied head, which
        the embedding reads. They come back, exactly, by whatever needs them: `train()`, a call that
        records gradients, `to()` and its kin, `state_dict()`, loading, saving, copying.

        Args:
            batch_size: how many rows a step decodes: prompts times beams or candidates.
            weights: "int8" rounds the weights to eight bits, "int4" on a GPU those of the layers to
                four (torchao; the rest stays as it is). This is lossy and cannot be undone.

        Returns:
            The model itself.

        Raises:
            InputError: an unknown `weights`.
            UnsupportedError: rounding without torchao, "int4" without a GPU, and later, what needs the
                weights unrounded.
        """
        prepare(self, batch_size, weights)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._files.check(self)
        restore(self)  # or refuse, before anything has moved
        return super()._apply(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        attn_implementation: str | None = None,
        output_loading_info: bool = False,
        device_map: Device | DeviceMap | None = None,
        max_memory: MaxMemory | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        mmap: bool | None = None,
        **options: Any,
    ) -> Self | tuple[Self, dict[str, list[str]]]:
        """Loads a checkpoint from a directory or from the hub, in evaluation mode.

        Args:
            name_or_path: a directory, or the name of a model on the hub.
            attn_implementation: "sdpa" (the default), "eager", or on a GPU "flash_attention_2".
            output_loading_info: returns (model, report) instead of raising about missing or
                unexpected tensors.
            device_map: where the weights lie: "auto", "balanced", "balanced_low_0" or "sequential" let
                accelerate choose, a device takes all, a dict names a device or "disk" for each
                module. `hf_device_map` tells afterwards. See `opt_torch.offload.place`.
            max_memory: bytes, or such as "2GB", by device, for accelerate to choose by.
            offload_folder: for what belongs on disk, and the checkpoint does not hold as it is used.
            mmap: False reads the weights into memory; True leaves them in their files, whose pages are
                read when they are touched: for models that barely fit, in files that nobody writes
                to while the model lives. None does so with safetensors in the hub's cache. See
                docs/architecture.md, "Files that change".
            options: `dtype`, `config`, `ignore_mismatched_sizes`, hub options and configuration
                overrides: see `opt_core.pretrained.open_pretrained`, which also lists the errors.
        """
        if device_map is None and (max_memory is not None or offload_folder is not None):
            raise InputError("max_memory, offload_folder: expected a device_map, found none.")
        # A class of the user's need not take an argument that nobody gives.
        kernel = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        with open_pretrained(
            name_or_path,
            cls.architecture,
            output_loading_info=output_loading_info,
            **options,
        ) as pretrained:
            config = pretrained.config
            with without_values():
                model = cls(config, **kernel)
            made = dict(model.named_parameters(remove_duplicate=False))
            added = added_tensors(model, config, cls.architecture)
            shapes = {name: tuple(tensor.shape) for name, tensor in added.items()}
            found, report = pretrained.check(shapes)
            dtype = getattr(torch, pretrained.dtype)
            assign_added(added, found, dtype)
            mapped = decide(pretrained, mmap)
            named: Sequence[NamedFile] = ()
            if device_map is None:
                assign(model, config, cls.architecture, pretrained.sources, dtype, mapped)
                follow(model, made)
            else:
                named = place(model, pretrained, device_map, max_memory, offload_folder, mapped)
            watch(model, Files(pretrained.reader.mapped, named))
        model.tie_weights()
        model.generation_config = pretrained.generation_config
        model.eval()
        return (model, report.loading_info()) if output_loading_info else model

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
    ) -> None:
        """Writes config, generation config and canonical safetensors into `directory`.

        Args:
            directory: made if need be.
            max_shard_size: bytes, or such as "5GB".
            safe_serialization: if False, pytorch_model.bin is written instead of safetensors.
        """
        self._files.check(self)
        restore(self)
        config, arch = self._actual_config, self.architecture
        tensors = [*canonical_arrays(self, config, arch)]
        added = [*added_outgoing(self, config, arch)]  # or refused, with the layer's name
        save_pretrained(
            directory,
            config,
            self.generation_config,
            arch,
            tensors,
            own_format="bin",
            added=added,
            max_shard_size=max_shard_size,
            safe_serialization=safe_serialization,
        )
