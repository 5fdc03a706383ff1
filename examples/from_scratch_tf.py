# SPDX-License-Identifier: Apache-2.0
"""Training from scratch in TensorFlow: a small OPT learns sums and differences in words.

    python examples/from_scratch_tf.py --output my-sums     (needs opt-zoo[tf]; a few minutes)

Writes a checkpoint that all three frameworks load. The same in PyTorch and JAX: `from_scratch_torch.py`
and `from_scratch_flax.py`.
"""

from __future__ import annotations

import io
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from opt_tf import TFOPTForCausalLM  # before keras: it chooses the backend

import keras  # isort: skip
import numpy as np
import tensorflow as tf

from examples.sums import PLAN, WEIGHT_DECAY, accuracy, config, tokenizer_and_data
from examples.training import (
    LARGEST_NORM,
    Array,
    Measure,
    Progress,
    Rows,
    argument_parser,
    order,
    parts_of,
    warmup,
)
from opt_core.files import atomic_write


class Course(keras.optimizers.schedules.LearningRateSchedule):
    """The rate of each step: Keras counts the parts of batches instead."""

    def __init__(self, peak: float, steps: int, parts: int) -> None:
        warm = warmup(steps)
        self.parts = parts
        self.rate = keras.optimizers.schedules.CosineDecay(
            0.0, steps - warm, warmup_target=peak, warmup_steps=warm
        )

    def __call__(self, step: Any) -> Any:
        return self.rate(step // self.parts)


class Trainer:
    """A model, its optimizer and the rate's course: all that a training changes.

    Args:
        peak: the highest rate.
        parts: in how many of them a batch is computed, one after another, to need less memory.
        weight_decay: as a share of the rate.
    """

    def __init__(
        self,
        model: TFOPTForCausalLM,
        peak: float,
        steps: int,
        *,
        parts: int = 1,
        weight_decay: float = 0.1,
    ) -> None:
        self.model = model
        self.optimizer = keras.optimizers.AdamW(
            Course(peak, steps, parts),
            weight_decay=weight_decay,
            epsilon=1e-8,
            global_clipnorm=LARGEST_NORM,
            gradient_accumulation_steps=parts if parts > 1 else None,
        )
        self.optimizer.build(model.trainable_variables)
        self.parts = parts
        model.compile(self.optimizer, jit_compile=True)

    @property
    def step(self) -> int:
        return int(self.optimizer.iterations)

    def train(self, input_ids: Array, labels: Array) -> float:
        """One step of AdamW, as each of `fit`; the loss before it."""
        losses = [self.model.train_on_batch(*part) for part in self.parts_of(input_ids, labels)]
        return float(np.mean(losses))

    def parts_of(self, input_ids: Array, labels: Array) -> Iterator[tuple[Any, Array, Array]]:
        """Inputs, targets and weights of a batch's parts, as `fit` takes them.

        Keras takes the mean of the parts, so each is weighed with its share of their sum.
        """
        for ids, targets, share in parts_of(self.parts, input_ids, labels):
            yield {"input_ids": ids}, targets, np.full(len(ids), share * self.parts, np.float32)

    def save(self, path: Path) -> None:
        """Writes all that the next step depends on, but for weights that do not learn."""
        file = io.BytesIO()
        np.savez(file, *(variable.numpy() for variable in self._variables()))
        atomic_write(path, file.getvalue())

    def load(self, path: Path) -> None:
        """Goes on where `save` was called."""
        with np.load(path) as state:
            for variable, name in zip(self._variables(), state.files, strict=True):
                variable.assign(state[name])

    def _variables(self) -> list[Any]:
        """Weights, seeds of the dropout, moments and the number of steps."""
        seeds = self.model.model.decoder.seed_generator.state
        return [*self.model.trainable_variables, seeds, *self.optimizer.variables]


class EachStep(keras.callbacks.Callback):
    """Notes each step of `fit`, which is one batch for each part."""

    def __init__(self, progress: Progress, parts: int) -> None:
        super().__init__()
        self.progress, self.parts = progress, parts

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch % self.parts == 0:
            self.model.reset_metrics()  # or the loss would be the mean since `fit` began

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (batch + 1) % self.parts == 0:
            self.progress.note(float(logs["loss"]))


def learn(trainer: Trainer, data: Rows, options: Namespace, measure: Measure) -> None:
    """Makes the steps that are left, by `fit`."""
    progress = Progress(trainer, options, measure)
    start, parts = trainer.step, trainer.parts
    each = order(len(data.labels), options.batch_size, options.seed, start)
    made = (trainer.parts_of(data.input_ids[rows], data.labels[rows]) for rows in each)
    shape = [options.batch_size // parts, data.labels.shape[1]]
    ids, targets = (tf.TensorSpec(shape, a.dtype) for a in (data.input_ids, data.labels))
    batches = tf.data.Dataset.from_generator(
        lambda: chain.from_iterable(made),
        output_signature=({"input_ids": ids}, targets, tf.TensorSpec(shape[:1], tf.float32)),
    )
    trainer.model.fit(
        batches,
        epochs=int(start < options.steps),
        steps_per_epoch=(options.steps - start) * parts,
        callbacks=[EachStep(progress, parts)],
        shuffle=False,  # `order` does
        verbose=0,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = argument_parser(__doc__, **PLAN).parse_args(arguments)
    keras.utils.set_random_seed(options.seed)
    tokenizer, data, held_out = tokenizer_and_data()
    model = TFOPTForCausalLM(config(len(tokenizer)))
    trainer = Trainer(model, options.learning_rate, options.steps, weight_decay=WEIGHT_DECAY)

    @tf.function(jit_compile=True)
    def compiled(input_ids: tf.Tensor) -> tf.Tensor:
        return tf.argmax(model(input_ids, use_cache=False).logits, -1)

    def choose(input_ids: Array) -> Array:
        """The most likely next token after each."""
        return compiled(tf.constant(input_ids)).numpy()

    learn(trainer, data, options, lambda: {"accuracy": accuracy(choose, held_out)})
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
