# SPDX-License-Identifier: Apache-2.0
"""What Keras asks of a model besides running: a loss, adapters, quantization, export, its making."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
import tensorflow as tf
from tensorflow import Tensor

from opt_core import InputError, OPTConfig, UnsupportedError
from opt_tf.adapters import add_lora, merge, quantizable, quantize_as, record
from opt_tf.export import export_saved_model, serving_function
from opt_tf.generation.programs import ModelPrograms


class KerasModel(keras.Model):
    """The part of the model classes that `fit`, `quantize`, `export` and `save` need."""

    config: OPTConfig
    attn_implementation: str
    programs: ModelPrograms
    compiled: bool  # Keras' own
    lora: dict[str, Any] | None = None  # the arguments of `enable_lora`

    def predictions_of(self, output: Any) -> Any:
        """What a loss given to `compile` compares with the target."""
        return output.logits

    def labels_in(self, inputs: Any) -> Any:
        """The labels that stand among the inputs, or None."""
        return inputs.get("labels") if isinstance(inputs, Mapping) else None

    def loss_of(self, output: Any, target: Any, sample_weight: Any = None) -> Tensor:
        """The model's own loss."""
        raise UnsupportedError(
            f"{type(self).__name__} has no loss of its own: compile(loss=...) takes one."
        )

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """The loss that `fit` minimises: the model's own, unless `compile` was given another.

        Its labels stand among the inputs (`{"input_ids": ..., "labels": ...}`) or are the target.
        Another loss gets the target and the logits as they are: nothing is shifted. `sample_weight`
        multiplies the losses of rows, or of single labels; as in Keras, their number divides, not
        the sum of their weights.
        """
        labels = self.labels_in(x) if y is None else y
        if isinstance(y_pred, tuple):
            raise InputError(
                "fit and evaluate: expected outputs with names, found a tuple, as config.return_dict "
                "is False. Set it to True."
            )
        if self.loss is not None:
            predictions = self.predictions_of(y_pred)
            return super().compute_loss(x, labels, predictions, sample_weight, training)
        if labels is None:
            raise InputError(
                "There are no labels to learn from: give them among the inputs, as "
                '{"input_ids": ..., "labels": ...}, or as the target.'
            )
        if y is None and sample_weight is None:
            loss = y_pred.loss
        else:
            loss = self.loss_of(y_pred, labels, sample_weight)
        added = (tf.cast(tf.reduce_sum(x), loss.dtype) for x in self.losses)  # by regularizers
        loss = tf.add_n([loss, *added])
        # Each replica sees its share of the batch, and their gradients are added up.
        return loss / tf.distribute.get_strategy().num_replicas_in_sync

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """The metrics given to `compile`, of the logits and the target, or the labels given as inputs."""
        y = self.labels_in(x) if y is None else y
        return super().compute_metrics(x, y, self.predictions_of(y_pred), sample_weight)

    def _forget(self) -> None:
        """Drops what was compiled with variables that are others now."""
        self.programs.clear()
        self.train_function = self.test_function = self.predict_function = None
        if self.compiled:
            self.compiled = False
            self.optimizer = None

    def enable_lora(
        self,
        rank: int,
        lora_alpha: float | None = None,
        targets: Sequence[str] = ("q_proj", "v_proj"),
    ) -> None:
        """Freezes the model, and gives its linear layers of some names adapters that learn: LoRA.

        Each computes with its kernel plus `lora_alpha / rank` times a product of two small matrices,
        by Keras' own `enable_lora`. The head of a classifier or reader goes on learning in full.
        Quantize before, if at all. `compile` the model again before `fit`; `save_pretrained` writes
        the sums.

        Args:
            rank: the inner dimension of the products.
            lora_alpha: by default the rank.
            targets: names of linear layers.

        Raises:
            InputError: a rank below 1, a name that no linear layer has, or LoRA already there.
        """
        add_lora(self, rank, lora_alpha, targets)
        self.lora = {"rank": rank, "lora_alpha": lora_alpha, "targets": [*targets]}
        self._forget()

    def merge_lora(self, adapted: Self) -> Self:
        """Adds what LoRA has learnt in another model, quantized or not, to the weights of this one."""
        merge(adapted, self)
        return self

    def quantize(self, mode: str | None = None, config: Any = None, filters: Any = None) -> None:
        """Rounds weights by Keras' own quantization; see `keras.Model.quantize`.

        Linear layers are rounded, and word embeddings that are not the head as well. `compile` the
        model again before `fit`. `save` writes a Keras file; `save_pretrained` refuses.

        Args:
            mode: "int8", "int4" or "float8".
            config: Keras' configuration of it, which may stand for the mode.
            filters: which layers: a pattern of their names, several, or a function of a layer.

        Raises:
            UnsupportedError: another mode.
        """
        chosen = quantizable(self, mode, filters)
        super().quantize(mode, config=config, filters=chosen, type_check=False)
        self.programs.clear()

    @property
    def input_signature(self) -> dict[str, tf.TensorSpec]:
        """What `serving` takes: ids and mask of any number of rows and tokens."""
        names = ("input_ids", "attention_mask")
        return {name: tf.TensorSpec((None, None), tf.int32, name) for name in names}

    @property
    def serving(self) -> Any:
        """The model as a `tf.function` of one dict, a signature for `tf.saved_model.save`."""
        return serving_function(self)

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """Writes the model for use without this package, as `keras.Model.export` does.

        Args:
            filepath: a directory.
            format: Keras' name of it; only a SavedModel is tested.
            verbose: whether Keras tells what it has written.
            input_signature: a list of the dict that the model is given; by default that of
                `input_signature`.
            kwargs: of other formats.
        """
        if format == "tf_saved_model":
            export_saved_model(self, filepath, verbose is not False, input_signature)
        else:
            super().export(filepath, format, verbose, input_signature, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """What a `.keras` file records of the model's making."""
        return {
            **keras.layers.Layer.get_config(self),
            "config": self._actual_config.to_dict(),
            "attn_implementation": self.attn_implementation,
            "quantized": record(self),
            "lora": self.lora,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """The inverse of `get_config`."""
        given = {**config, "config": OPTConfig.from_dict(config["config"])}
        quantized, lora = given.pop("quantized", {}), given.pop("lora", None)
        model = cls(**given)
        quantize_as(model, quantized)
        if lora is not None:
            model.enable_lora(**lora)
        return model
